"""Prefixes inside transformers' attention: what is registered with it under "fastpeft", the masks that go with that,
the positions of the real tokens behind a prefix, and the attention classes that its interface does not reach."""
