"""Images to batches, on the host: sources, decoding, crops, masks, the pipeline.

Nothing here imports JAX or reads the config: it runs in Grain's worker processes.
"""
