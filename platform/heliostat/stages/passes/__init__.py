"""The passes: what the stages that compress do, as plain functions from the folder of one model to that of another."""
