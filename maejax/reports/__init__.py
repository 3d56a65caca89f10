"""Reports that people open: one HTML file each, with everything inside it.

`page` makes the file, `charts` its curves, `pictures` its images; `run` and `sweep` say what is told of each.
"""
