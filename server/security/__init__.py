"""Who may do what: roles, tokens, the access file, rates, the audit log. Knows no gRPC; `rpc/auth.py` asks it."""
