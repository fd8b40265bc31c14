"""What each head can leave out: candidates, their errors and times, a search under a budget, and the plan in use."""
