"""`python -m worker`: how the supervisor starts a worker."""

from worker.main import main

main()
