/*
 * Open and close a file again and again; say how long one pair takes.
 *
 *     openclose FILE [PAIRS [rdonly|rdwr]]
 *
 * Prints "PAIRS pairs, MICROSECONDS us each, RATE per second" on one line.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	long pairs = argc > 2 ? atol(argv[2]) : 100000;
	int flags = argc > 3 && !strcmp(argv[3], "rdwr") ? O_RDWR : O_RDONLY;
	double begin, took;
	long i;

	if (argc < 2 || pairs <= 0) {
		fprintf(stderr, "usage: openclose FILE [PAIRS [rdonly|rdwr]]\n");
		return 2;
	}
	begin = now();
	for (i = 0; i < pairs; i++) {
		int fd = open(argv[1], flags | O_CLOEXEC);

		if (fd < 0) {
			fprintf(stderr, "openclose: %s: %s\n", argv[1], strerror(errno));
			return 1;
		}
		close(fd);
	}
	took = now() - begin;
	printf("%ld pairs, %.2f us each, %.0f per second\n", pairs, took / pairs * 1e6,
	       pairs / took);
	return 0;
}
