"""A bare gRPC service: the two calls that a worker makes for a job, with the same messages and no queue behind them.

It answers a request for a job with a job of the size that jobqueue sends, and a completion with success.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).parent.parent))
from worker_pb2_gen import worker_pb2, worker_pb2_grpc  # noqa: E402


def job():
    """A job as jobqueue hands it out in this benchmark: what bench.protocols sends, with its headers."""
    return worker_pb2.Job(
        id="550e8400-e29b-41d4-a716-446655440000",
        payload='{"tag":"~001-0001-00000001","text":"%s"}' % ("x" * 62),
        headers={
            "Host": "127.0.0.1:30000",
            "User-Agent": "bench/1.0",
            "Accept": "*/*",
            "Content-Type": "application/x-ndjson",
        },
        queue="default",
        attempt=1,
        lease_token="0123456789abcdef",
        lease_seconds=300,
        created_at="2023-06-01T12:34:56.123456Z",
    )


class Echo(worker_pb2_grpc.WorkerServiceServicer):
    def RequestJob(self, request, context):
        return job()

    def CompleteJob(self, request, context):
        return worker_pb2.CompleteResponse(success=True)


if __name__ == "__main__":
    # Two threads were the fastest of 1, 2, 4, 8 and 16 for eight callers (1,570 pairs/s in the median; the others 1,090
    # to 1,150): more of them only fight for the interpreter lock.
    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=[("grpc.so_reuseport", 0)])
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Echo(), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()
