/* Work that only one node does at a time, with nothing but open(2) and close(2): no library.
 *
 *     gcc -o turns turns.c
 *     ./turns /mnt/locks/jobs/backup COMMAND [ARG...]
 *
 * Waits for the lock, runs the command, gives the lock back. Exit code: the command's, 128+N if
 * signal N ended it, 2 for wrong arguments, 1 if the lock cannot be had or was lost.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char token[32] = "";
	int lock, status;
	pid_t child;

	if (argc < 3) {
		fprintf(stderr, "usage: turns LOCK COMMAND [ARG...]\n");
		return 2;
	}
	/* O_RDWR: exclusive. O_RDONLY would be shared; with O_NONBLOCK it fails with ETXTBSY instead of
	 * waiting. A signal ends the wait with EINTR, whatever its handler's flags are. */
	do
		lock = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	while (lock < 0 && errno == EINTR);
	if (lock < 0) {
		fprintf(stderr, "turns: %s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	/* Larger for each later holder: what the command writes to can refuse an older one. */
	if (fgetxattr(lock, "user.dlmfs.token", token, sizeof token - 1) > 0)
		fprintf(stderr, "turns: token %s\n", token);
	child = fork();
	if (child == 0) {
		execvp(argv[2], argv + 2);
		_exit(127);
	}
	if (child < 0 || waitpid(child, &status, 0) < 0) {
		perror("turns");
		return 1;
	}
	struct pollfd held = { lock, POLLIN, 0 };

	if (poll(&held, 1, 0) > 0 && held.revents & POLLERR) {
		fprintf(stderr, "turns: the lock was lost meanwhile\n");
		return 1;
	}
	close(lock);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
