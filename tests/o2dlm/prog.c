/* libo2dlm's calls by command, for tests: one line in, one line out.
 *
 *     init PATH DOMAIN     lock ID pr|ex [try]    bast ID pr|ex [try]    poll MS
 *     unlock ID            drop ID                write ID TEXT          read ID
 *     caps                 destroy                statfs PATH            fstatfs PATH
 *     exit N               raise N                fork COMMAND           thread COMMAND
 *     faults PATH          compat PATH            daemon PATH            storm ID
 *
 * The answer is "ok ..." or the name of the error.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <o2dlm/o2dlm.h>

#define NAME(code) { O2DLM_ET_##code, #code }
static const struct {
	errcode_t code;
	const char *name;
} names[] = {
	NAME(NO_MEMORY), NAME(SERVICE_UNAVAILABLE), NAME(INVALID_LOCK_NAME), NAME(INVALID_LOCK_LEVEL),
	NAME(NAME_TOO_LONG), NAME(STATFS), NAME(NO_FS_DIR), NAME(NO_FS), NAME(OPEN_DLM_DIR),
	NAME(BAD_DOMAIN_DIR), NAME(DOMAIN_DIR), NAME(DOMAIN_DESTROY), NAME(DOMAIN_CREATE),
	NAME(BUSY_LOCK), NAME(UNLINK), NAME(UNKNOWN_LOCK), NAME(RECURSIVE_LOCK), NAME(LOCKING),
	NAME(FAILED_UNLOCKS), NAME(INVALID_ARGS), NAME(TRYLOCK_FAILED), NAME(LVB_READ), NAME(LVB_WRITE),
	NAME(SEEK), NAME(BAST_UNSUPPORTED), NAME(LVB_INVALID),
};

static struct o2dlm_ctxt *context;
static int bast_fd = -1;
static int notices;

static void wanted(void *number)
{
	++*(int *)number;
}

static void tell(errcode_t code)
{
	if (!code) {
		puts("ok");
		return;
	}
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (names[i].code == code) {
			puts(names[i].name);
			return;
		}
	printf("code %ld\n", code);
}

static void tell_errno(int failed)
{
	if (failed)
		printf("errno %d\n", errno);
	else
		puts("ok");
}

static void value(char *id)
{
	char lvb[65] = "";
	unsigned int got = 0;
	errcode_t code = o2dlm_read_lvb(context, id, lvb, 64, &got);

	if (code)
		tell(code);
	else
		printf("ok %u %s\n", got, lvb);
}

static void describe(int failed, const struct statfs *fs)
{
	if (failed)
		tell_errno(failed);
	else
		printf("ok %lx %ld %ld %ld %ld %ld\n", (unsigned long)fs->f_type, (long)fs->f_bsize,
		       (long)fs->f_blocks, (long)fs->f_files, (long)fs->f_namelen, (long)fs->f_frsize);
}

/* What statfs(2) says to addresses and names that are none. */
static void faults(const char *path)
{
	struct statfs fs, *nowhere = (struct statfs *)8;
	int fd = open(path, O_RDONLY);
	char *longest = malloc(8192);

	memset(longest, 'x', 8191);
	longest[8191] = 0;
	printf("ok %d", statfs(path, nowhere) ? errno : 0);
	printf(" %d", fstatfs(fd, nowhere) ? errno : 0);
	printf(" %d", statfs((char *)nowhere, &fs) ? errno : 0);
	printf(" %d", statfs("", &fs) ? errno : 0);
	printf(" %d", statfs(longest, &fs) ? errno : 0);
	printf(" %d", statfs("/nosuch", &fs) ? errno : 0);
	printf(" %d\n", fstatfs(-1, &fs) ? errno : 0);
	close(fd);
	free(longest);
}

/* A system call of the 32-bit kind with the number of the 64-bit fstatfs: it is setfsuid there. */
static void compat(const char *path)
{
#ifdef __x86_64__
	int fd = open(path, O_RDONLY), was;
	struct statfs *fs = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);

	__asm__ volatile("int $0x80" : "=a"(was) : "0"(138), "b"(fd), "c"(fs) : "memory");
	printf("ok %d %lx\n", setfsuid(was) == fd, (unsigned long)fs->f_type);
	close(fd);
#else
	printf("%s: not here\n", path);
#endif
}

/* A process that outlives this one, reads a line from the fifo and writes the type to a file. */
static void daemonized(const char *path)
{
	char fifo[4096], file[4096], line[4096] = "";
	struct statfs fs;
	pid_t pid;

	snprintf(fifo, sizeof fifo, "%s.fifo", path);
	snprintf(file, sizeof file, "%s.out", path);
	fflush(stdout);
	pid = fork();
	if (pid) {
		printf("ok %d\n", pid);
		return;
	}
	setsid();
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	FILE *in = fopen(fifo, "r");
	if (!in || !fgets(line, sizeof line, in))
		_exit(1);
	line[strcspn(line, "\n")] = 0;
	int failed = statfs(line, &fs);
	FILE *out = fopen(file, "w");
	fprintf(out, "%lx\n", failed ? 0 : (unsigned long)fs.f_type);
	fclose(out);
	_exit(0);
}

static volatile sig_atomic_t caught;

static void count_it(int number)
{
	(void)number;
	++caught;
}

/* Writes under a timer that never lets a slow call in peace: how many of them failed. */
static void storm(char *id)
{
	struct sigaction act = { .sa_handler = count_it, .sa_flags = SA_RESTART };
	struct itimerval every = { { 0, 1000 }, { 0, 1000 } }, never = { { 0, 0 }, { 0, 0 } };
	int failed = 0;
	char text[32];
	unsigned int count;

	caught = 0;
	sigaction(SIGALRM, &act, NULL);
	setitimer(ITIMER_REAL, &every, NULL);
	for (int n = 0; n < 100 || caught < 100; n++) {
		snprintf(text, sizeof text, "%d", n);
		failed += o2dlm_write_lvb(context, id, text, strlen(text), &count) != 0;
	}
	setitimer(ITIMER_REAL, &never, NULL);
	printf("ok %d\n", failed);
}

static void obey(char *line);

static void *in_thread(void *line)
{
	obey(line);
	return NULL;
}

static void elsewhere(int thread, char *line)
{
	pthread_t made;
	int status;

	if (thread) {
		if (pthread_create(&made, NULL, in_thread, line) || pthread_join(made, NULL))
			puts("no thread");
		return;
	}
	fflush(stdout);
	if (fork() == 0) {
		obey(line);
		fflush(stdout);
		_exit(0);
	}
	wait(&status);
}

static void obey(char *line)
{
	char *save, *verb = strtok_r(line, " \n", &save);
	char *rest = save;
	struct statfs fs;
	unsigned int count;
	int yes = 0;

	if (!verb)
		return;
	if (!strcmp(verb, "fork") || !strcmp(verb, "thread")) {
		elsewhere(*verb == 't', rest);
		return;
	}
	char *a = strtok_r(NULL, " \n", &save), *b = strtok_r(NULL, " \n", &save);
	int flags = strtok_r(NULL, " \n", &save) ? O2DLM_TRYLOCK : 0;
	enum o2dlm_lock_level level = b && *b == 'e' ? O2DLM_LEVEL_EXMODE : O2DLM_LEVEL_PRMODE;

	if (!strcmp(verb, "init"))
		tell(o2dlm_initialize(a, b, &context));
	else if (!strcmp(verb, "lock"))
		tell(o2dlm_lock(context, a, flags, level));
	else if (!strcmp(verb, "bast"))
		tell(o2dlm_lock_with_bast(context, a, flags, level, wanted, &notices, &bast_fd));
	else if (!strcmp(verb, "poll")) {
		struct pollfd on = { bast_fd, POLLIN, 0 };

		if (poll(&on, 1, atoi(a)) > 0 && on.revents & POLLIN)
			o2dlm_process_bast(context, bast_fd);
		printf("ok %d\n", notices);
	} else if (!strcmp(verb, "unlock"))
		tell(o2dlm_unlock(context, a));
	else if (!strcmp(verb, "drop"))
		tell(o2dlm_drop_lock(context, a));
	else if (!strcmp(verb, "write"))
		tell(o2dlm_write_lvb(context, a, b, strlen(b), &count));
	else if (!strcmp(verb, "read"))
		value(a);
	else if (!strcmp(verb, "caps")) {
		errcode_t code = o2dlm_supports_bast(&yes);
		int glue = 0;

		if (code || (code = o2dlm_supports_stackglue(&glue)))
			tell(code);
		else
			printf("ok %d %d\n", yes, glue);
	} else if (!strcmp(verb, "destroy"))
		tell(o2dlm_destroy(context));
	else if (!strcmp(verb, "statfs"))
		describe(statfs(a, &fs), &fs);
	else if (!strcmp(verb, "fstatfs")) {
		int fd = open(a, O_RDONLY);

		describe(fd < 0 || fstatfs(fd, &fs), &fs);
		close(fd);
	} else if (!strcmp(verb, "faults"))
		faults(a);
	else if (!strcmp(verb, "compat"))
		compat(a);
	else if (!strcmp(verb, "daemon"))
		daemonized(a);
	else if (!strcmp(verb, "storm"))
		storm(a);
	else if (!strcmp(verb, "exit"))
		exit(atoi(a));
	else if (!strcmp(verb, "raise"))
		raise(atoi(a));
	else
		puts("what?");
}

int main(void)
{
	char line[4096];

	setvbuf(stdout, NULL, _IOLBF, 0);
	while (fgets(line, sizeof line, stdin))
		obey(line);
	return 0;
}
