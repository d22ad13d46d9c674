"""Projection and softmax loss in one, by chunks of rows or of classes."""
