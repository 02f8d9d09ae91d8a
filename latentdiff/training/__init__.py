"""The two trainings: the loop, the losses, the average of the weights, checkpoints."""
