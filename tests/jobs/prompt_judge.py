"""`python -m tests.jobs.prompt_judge RUN TOKEN STEP` is `jobs.evaluate.beside` that a busy machine does not hold up."""

from jobs.evaluate import beside

if __name__ == "__main__":
    beside.give_way = lambda: None
    beside.main()
