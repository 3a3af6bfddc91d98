"""Start a recipe on this machine, or submit it to Slurm, Kubernetes or Hugging Face Jobs: ``hf-tfm launch``.

options, recipe and its arguments -> checked -> environment and command of one node -> script or manifest -> submitted
"""
