"""The task of the Python queues: RQ, Huey and Celery on one Redis, each as its users run it for short jobs.

Their own client libraries do both sides, since nobody speaks their protocols by hand. The port is in BENCH_REDIS,
the queue that this process is for in BENCH_QUEUE.
"""
import os

PORT = int(os.environ.get("BENCH_REDIS", "6379"))
KIND = os.environ.get("BENCH_QUEUE", "")


def work(tag):
    """What a worker makes of a job: the same as in protocols.py."""
    return f'{{"done":"{tag}"}}'


def rq_queue():
    import redis
    import rq

    return rq.Queue(connection=redis.Redis(port=PORT, db=1))


if KIND == "huey":
    import huey as huey_package

    huey = huey_package.RedisHuey("bench", host="127.0.0.1", port=PORT, db=2, notify_result=True)
    huey_work = huey.task()(work)

if KIND == "celery":
    import celery

    app = celery.Celery(
        "tasks", broker=f"redis://127.0.0.1:{PORT}/3", backend=f"redis://127.0.0.1:{PORT}/4"
    )
    app.conf.update(worker_prefetch_multiplier=1, task_ignore_result=False, broker_connection_retry_on_startup=True)
    celery_work = app.task(name="work")(work)
