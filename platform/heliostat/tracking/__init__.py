"""What happened, told to MLflow: one tree of runs, pipeline > stage > trial. The only package that imports mlflow."""
