/*
 * A file system that does nothing: one directory, one file "lock" that opens at once. The cost of
 * an open and close here is what FUSE costs with no lock service behind it.
 *
 *     nullfs MOUNTPOINT [FUSE OPTIONS]      stays in the foreground; end it with SIGINT or umount
 *
 * libfuse 3, low level, one thread. Time-outs and open flags are those of dlmfs.
 */
#define FUSE_USE_VERSION 312
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define TIMEOUT 3600.0
#define FILE_INO 2

static void fill(fuse_ino_t ino, struct stat *st)
{
	memset(st, 0, sizeof(*st));
	st->st_ino = ino;
	st->st_mode = ino == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0666;
	st->st_nlink = ino == FUSE_ROOT_ID ? 2 : 1;
	st->st_size = ino == FUSE_ROOT_ID ? 0 : 64;
	st->st_blksize = 4096;
}

static void null_init(void *data, struct fuse_conn_info *conn)
{
	(void)data;
	conn->want &= ~FUSE_CAP_ATOMIC_O_TRUNC;
	conn->max_write = 4096;
	conn->max_background = 65535;
}

static void null_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = {
		.ino = FILE_INO, .entry_timeout = TIMEOUT, .attr_timeout = TIMEOUT,
	};

	if (parent != FUSE_ROOT_ID || strcmp(name, "lock")) {
		fuse_reply_err(req, ENOENT);
		return;
	}
	fill(FILE_INO, &entry.attr);
	fuse_reply_entry(req, &entry);
}

static void null_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct stat st;

	(void)fi;
	fill(ino, &st);
	fuse_reply_attr(req, &st, TIMEOUT);
}

static void null_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	fi->direct_io = 1;
	fi->noflush = 1;
	fi->fh = 1;
	fuse_reply_open(req, fi);
}

static void null_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	fuse_reply_err(req, 0);
}

static const struct fuse_lowlevel_ops operations = {
	.init = null_init,
	.lookup = null_lookup,
	.getattr = null_getattr,
	.open = null_open,
	.release = null_release,
};

int main(int argc, char **argv)
{
	struct fuse_args args = FUSE_ARGS_INIT(argc, argv);
	struct fuse_cmdline_opts options;
	struct fuse_session *session;
	int failed = 1;

	if (fuse_parse_cmdline(&args, &options) || !options.mountpoint) {
		fprintf(stderr, "usage: nullfs MOUNTPOINT [-o OPTIONS]\n");
		return 2;
	}
	session = fuse_session_new(&args, &operations, sizeof(operations), NULL);
	if (session && !fuse_set_signal_handlers(session) &&
	    !fuse_session_mount(session, options.mountpoint)) {
		failed = fuse_session_loop(session) != 0;
		fuse_session_unmount(session);
	}
	if (session)
		fuse_session_destroy(session);
	return failed;
}
