"""Make a trained model smaller and faster, and measure whether it really is: functions from model to model.

`formats` saves and loads, `prune`, `quantize` and `distill` compress, `measure` tells the truth about the outcome and
`pareto` chooses. Nothing here knows about Ray, MLflow or the training loop.
"""
