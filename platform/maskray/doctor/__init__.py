"""What is wrong, said before a job is: checks that take seconds and leave nothing behind."""
