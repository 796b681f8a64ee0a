"""What the command `remote-ops` does. It is no library, `remote_ops.Endpoint` is; flags are `__main__`'s affair."""
