"""Ways to compute with, or only to store, small integers.

`post_training` turns one ONNX artifact into another, for ONNX Runtime; `eager` keeps a torch model, by torchao. `aware`
lets a torch model train with the rounding that int8 will bring, and `sensitivity` finds the layers that had better stay
in float.
"""
