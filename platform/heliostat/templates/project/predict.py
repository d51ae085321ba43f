"""Use the chosen model: `python predict.py FOLDER`, with the folder that `heliostat run` named."""

import sys

from task import build_data

import heliostat

model = heliostat.load_model(sys.argv[1], trust_code=True)  # of this project; a torch model of others runs their code
inputs, targets = build_data()["test"][:8]
print("predicted:", model(inputs).argmax(dim=1).tolist())
print("true:     ", targets.tolist())
