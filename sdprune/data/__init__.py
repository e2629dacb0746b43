"""Labelled text: tasks and files, the bundled sample, tokenised rows, batches of like lengths, metrics."""
