"""Threads that start together."""

import threading


def at_once(jobs):
    """The results of the jobs, each in a thread of its own, started together."""
    results, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(place):
        try:
            barrier.wait()
            results[place] = jobs[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
