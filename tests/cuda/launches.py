"""What the CUDA tests of all ops ask of their launches."""

import contextlib

import torch


def assert_replays(step):
    """step() in a CUDA graph gives what it gives outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    for replayed, expected in zip(results, step(), strict=True):
        torch.testing.assert_close(replayed, expected, rtol=1e-2, atol=1e-2)


def assert_repeats(compute, times):
    """`compute` gives the same tensors every time, bit for bit."""
    first = compute()
    for _ in range(times):
        assert all(torch.equal(*pair) for pair in zip(first, compute(), strict=True))


@contextlib.contextmanager
def waiting_is_an_error():
    """Within it, whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
