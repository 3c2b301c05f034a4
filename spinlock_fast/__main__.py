"""`python -m spinlock_fast <verb>`."""

from spinlock_fast.cli import main

main()
