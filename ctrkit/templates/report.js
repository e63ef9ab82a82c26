// The page is whole without this script. It adds: one variant's lines alone, the gallery by category, the map's hover.
(function () {
  "use strict";
  document.documentElement.classList.add("script");
  var all = function (selector, within) { return Array.prototype.slice.call((within || document).querySelectorAll(selector)); };

  // A press on a variant's name fades the others' lines, in all charts of its section.
  all(".key button[data-line]").forEach(function (button) {
    button.addEventListener("click", function () {
      var section = button.closest("section"), on = button.getAttribute("aria-pressed") !== "true";
      all(".key button", section).forEach(function (b) { b.setAttribute("aria-pressed", String(on && b === button)); });
      section.classList.toggle("chosen", on);
      all(".line", section).forEach(function (line) { line.classList.toggle("on", line.dataset.line === button.dataset.line); });
    });
  });

  var filter = document.getElementById("attention-filter");
  if (filter) {
    filter.addEventListener("change", function () {
      all("#attention .case").forEach(function (c) { c.hidden = filter.value !== "" && c.dataset.category !== filter.value; });
    });
  }

  var map = document.getElementById("map");
  if (!map) { return; }
  var data = JSON.parse(document.getElementById("map-data").textContent);
  var points = all(".point", map), tip = document.getElementById("map-tip"), crop = tip.querySelector(".crop");
  var user = document.getElementById("map-user"), category = document.getElementById("map-category"), now = 0, near = -1;
  var missing = {};
  data.missing.forEach(function (n) { missing[n] = true; });
  var places = points.map(function (p) {
    var t = p.getAttribute("transform").match(/[\d.]+/g);
    p.querySelector("title").remove(); // the tip says it
    return [Number(t[0]), Number(t[1])];
  });

  function colour() {
    now = Number(user.value);
    points.forEach(function (p, n) { p.setAttribute("fill", data.palette[data.shades[now][n]]); });
    document.getElementById("map-who") && (document.getElementById("map-who").textContent = data.users[now].name);
    document.getElementById("map-low").textContent = data.users[now].low;
    document.getElementById("map-high").textContent = data.users[now].high;
  }

  function fade() {
    points.forEach(function (p, n) { p.classList.toggle("off", category.value !== "" && data.ads[n][1] !== category.value); });
    hide();
  }

  function hide() {
    if (near >= 0) { points[near].classList.remove("near"); }
    near = -1;
    tip.hidden = true;
  }

  function show(event) {
    var box = map.getBoundingClientRect(), scale = map.viewBox.baseVal.width / box.width;
    var x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale, best = -1, reach = 18 * Math.max(1, scale);
    reach = reach * reach;
    places.forEach(function (p, n) {
      var d = (p[0] - x) * (p[0] - x) + (p[1] - y) * (p[1] - y);
      if (d < reach && !points[n].classList.contains("off")) { best = n; reach = d; }
    });
    if (best < 0) { hide(); return; }
    if (best !== near) {
      hide();
      near = best;
      points[best].classList.add("near");
      var ad = data.ads[best], lines = ["ad " + ad[0], ad[1], "predicted CTR " + data.ctr[now][best].toFixed(3), ad[2] + " impressions"];
      tip.querySelector("span").textContent = lines.filter(Boolean).join("\n");
      if (crop) {
        var s = data.sprite, image = crop.querySelector("img");
        crop.hidden = Boolean(missing[best]);
        image.style.width = 96 * s.columns + "px";
        image.style.height = 96 * s.rows + "px";
        image.style.left = -96 * (best % s.columns) + "px";
        image.style.top = -96 * Math.floor(best / s.columns) + "px";
      }
      tip.hidden = false;
    }
    var px = places[best][0] / scale, py = places[best][1] / scale, wide = tip.offsetWidth, tall = tip.offsetHeight;
    tip.style.left = Math.max(0, Math.min(px + 14, box.width - wide)) + "px";
    tip.style.top = (py + 14 + tall > box.height ? Math.max(0, py - tall - 14) : py + 14) + "px";
  }

  user.addEventListener("change", colour);
  category.addEventListener("change", fade);
  map.addEventListener("pointermove", show);
  map.addEventListener("pointerdown", show);
  map.addEventListener("pointerleave", function (event) { if (event.pointerType === "mouse") { hide(); } }); // a lifted finger leaves
  colour();
  fade();
})();
