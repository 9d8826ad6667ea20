"""TorchX components: the verbs of friendrec as jobs."""
