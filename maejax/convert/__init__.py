"""Weights in and out: runs to and from the files of the official MAE code, timm, Hugging Face, big_vision and ONNX.

`source`, `infer` and `read` take weights in, `write` gives them out, `verify` proves that both are the same function.
The names are in one table per format: `timm`, `facebook`, `huggingface`, `big_vision`, `onnx`.
"""
