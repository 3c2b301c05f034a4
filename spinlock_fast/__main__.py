"""`python -m spinlock_fast <verb>`."""

from spinlock_fast.commands.main import main

main()
