"""The stages: one thin command a file, installed as `ctrkit.stages`."""
