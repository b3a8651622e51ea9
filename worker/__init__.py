"""The model side: one process that loads one model and runs its speculative batch loop."""
