# Benchmarks: make bench-NAME [N=impressions] [BENCH='further options'] [BENCH_DATA=runs/bench, where logs are kept]
.PHONY: bench-logs bench-convert bench-group-size bench-feature-reads bench-extract bench-gauc bench-train bench-service bench-serve bench-export

bench-logs: $(READY) ## the raw logs that the benchmarks of the data stages read
	.venv/bin/python benchmarks/logs.py $(N:%=--impressions %) $(BENCH)

bench-convert: $(READY) ## convert + select-clicks + group against parsing the same CSV files
	.venv/bin/python benchmarks/convert.py $(N:%=--impressions %) $(BENCH)

bench-group-size: $(READY) ## grouped training files against the same samples ungrouped
	.venv/bin/python benchmarks/grouped_size.py $(N:%=--impressions %) $(BENCH)

bench-feature-reads: $(READY) ## random reads of picture vectors against converting as many side by side (N: rows of the file)
	.venv/bin/python benchmarks/feature_reads.py $(N:%=--rows %) $(BENCH)

bench-extract: $(READY) ## JPEG files to features.h5 against the bare network (N: pictures)
	.venv/bin/python benchmarks/extract.py $(N:%=--pictures %) $(BENCH)

bench-gauc: $(READY) ## GAUC against FuxiCTR's, and of a day of 219 million impressions (N: rows of the first)
	.venv/bin/python benchmarks/gauc.py $(N:%=--rows %) $(BENCH)

bench-train: $(READY) ## training DIN against DeepCTR-Torch and FuxiCTR, installed in a venv of their own; and DICM (N: impressions)
	.venv/bin/python benchmarks/train.py $(N:%=--impressions %) $(BENCH)

bench-service: $(READY) ## ranks that train DICM: bytes sent against shipping features, what merging saves, samples/s (N: impressions)
	.venv/bin/python benchmarks/service.py $(N:%=--impressions %) $(BENCH)

bench-export: $(READY) ## an exported model against predict: samples/s and the largest difference on 10,000 samples (N: samples), of a run that is there
	.venv/bin/python benchmarks/export.py $(N:%=--samples %) $(BENCH)

bench-serve: $(READY) ## ctrkit serve against its model in onnxruntime; BENCH='--soak 600' for ten minutes at 80% of the load
	.venv/bin/python benchmarks/serve.py $(BENCH)
