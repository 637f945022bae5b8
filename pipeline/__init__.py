"""Everything between object storage and MLflow: data, training, checkpoints, evaluation."""
