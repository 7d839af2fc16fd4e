"""The network: configuration, rotary embedding, attention, router, experts, transformer."""
