"""Modules that compute on packed weights, and the swap that puts them in a model."""
