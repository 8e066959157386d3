/* A number that all nodes share, in the 64 bytes that travel with a lock. Made with libo2dlm, as for
 * OCFS2's own dlmfs; nothing in it knows of this project.
 *
 *     gcc -o counter counter.c -lo2dlm -lcom_err         (Debian: ocfs2-tools-dev, comerr-dev)
 *     dlmfs o2dlm-run -- ./counter /dlm shop orders 3    adds 3, prints what it is then
 *
 * The number lives as long as some node has the lock: alone in the cluster each run begins at 0.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <o2dlm/o2dlm.h>

static int failed(const char *what, errcode_t code)
{
	if (code)
		fprintf(stderr, "counter: %s: %s\n", what, error_message(code));
	return code != 0;
}

int main(int argc, char **argv)
{
	struct o2dlm_ctxt *domain;
	char value[65] = "", text[64] = "";
	unsigned int done;
	int bad;

	initialize_o2dl_error_table();
	if (argc != 5) {
		fprintf(stderr, "usage: counter MOUNTPOINT DOMAIN LOCK ADD\n");
		return 2;
	}
	if (failed("joining", o2dlm_initialize(argv[1], argv[2], &domain)))
		return 1;
	/* Waits until no other node has it; from here on nobody changes the number but us. */
	bad = failed("locking", o2dlm_lock(domain, argv[3], 0, O2DLM_LEVEL_EXMODE));
	if (!bad) {
		bad = failed("reading", o2dlm_read_lvb(domain, argv[3], value, 64, &done));
		snprintf(text, sizeof text, "%ld", strtol(value, NULL, 10) + atol(argv[4]));
		bad = bad || failed("writing", o2dlm_write_lvb(domain, argv[3], text, sizeof text, &done));
		bad = failed("unlocking", o2dlm_unlock(domain, argv[3])) || bad;
	}
	if (!bad)
		puts(text);
	/* Removes this node's files of all locks that no process has open, and leaves the domain. The
	 * number lives as long as some node has the lock's file. */
	bad = failed("leaving", o2dlm_destroy(domain)) || bad;
	return bad;
}
