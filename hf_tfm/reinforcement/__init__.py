"""Reinforcement learning of language models: rewards, sampled completions, advantages and losses."""
