"""The trainer: any model, any batches. It knows nothing of tasks; what it is given is what it learns."""
