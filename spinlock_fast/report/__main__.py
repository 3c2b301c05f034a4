"""`python -m spinlock_fast.report`."""

from spinlock_fast.report.command import main

main()
