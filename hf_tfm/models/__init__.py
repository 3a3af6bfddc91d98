"""Models. Any file in this folder may be uploaded to the Hub with the weights, so it imports only its siblings, torch,
transformers and timm; siblings in the form ``from .file import Name``.
"""
