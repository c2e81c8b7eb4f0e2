"""The language: programs that read like Python, and run in parallel.

@function ── run ──▶ ProgramState ── += expressions ──▶ Execution ── on the loop ──▶ Backend
                          ▲                                 │
                          └──────── variables, text ────────┘

A program's body is plain Python and runs on its caller's thread; what it adds to its state is done
in order by one asyncio loop for all programs. Only reading a variable waits.
"""
