"""The models. Every file here may be uploaded to the Hub beside the weights, so it imports only its siblings, torch,
transformers and timm; siblings in the form ``from .file import Name``.
"""
