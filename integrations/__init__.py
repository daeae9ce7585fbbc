"""Adapters for training libraries, installed as ``nested_optim.integrations``."""
