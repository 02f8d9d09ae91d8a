"""Reading and writing models in the layouts of other projects."""
