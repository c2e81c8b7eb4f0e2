"""A load generator for LLM servers; it knows nothing of the engine and speaks only HTTP.

datasets ── conversations ──▶ load ── one request each turn ──▶ servers ── HTTP, SSE ──▶ server
                               │ answers with the times of their chunks
                               ▼
                            measures ──▶ report (table, JSON line), plot (SVG)
"""
