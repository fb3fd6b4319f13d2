"""The server of `seg-torch serve` and `seg-torch app`: the API, and the page at `/`.

One process speaks HTTP (`server`). Requests wait in one queue, from which each process with a copy
of the model takes batches (`batching`). In such a process images become answers (`model`). The
server keeps nothing: what the page shows and gives for download is in one answer (`/view`).
"""
