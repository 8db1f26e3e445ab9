/*
Files and folders as checkpoints need them: every error is fatal and names the path, and what is closed is on the disk.

  path_join          DIR/NAME in a buffer of PATH_SIZE bytes
  file_create        a new file for writing, or fail
  file_write         bytes into it
  file_close         flush, fsync, close; a full disk ends the program here at the latest
  file_rename        a name for another, at once
  file_read          a whole file as text with a 0 after it
  file_exists        whether anything has that name
  file_make_dirs     a folder and its parents
  file_sync_dir      fsync of a folder: new and renamed names in it are on the disk
  file_remove_tree   a file or a folder with all it holds

A path that cannot be written ends the program with STATUS_FAILED, one that cannot be read with STATUS_DATA.
*/
#ifndef CURIA_FILE_H
#define CURIA_FILE_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include "log.h"

enum { PATH_SIZE = 4096 };

// path[PATH_SIZE] = dir/name; returns path.
static inline char *path_join(char *path, const char *dir, const char *name) {
    if (snprintf(path, PATH_SIZE, "%s/%s", dir, name) >= PATH_SIZE)
        fail(STATUS_FAILED, "%.100s...: the path is too long; use a shorter one", dir);
    return path;
}

static inline FILE *file_create(const char *path) {
    FILE *f = fopen(path, "wb");
    if (!f) fail(STATUS_FAILED, "%s: cannot create it: %s", path, strerror(errno));
    return f;
}

static inline void file_write(FILE *f, const char *path, const void *data, size_t bytes) {
    if (fwrite(data, 1, bytes, f) != bytes) fail(STATUS_FAILED, "%s: cannot write %zu bytes: %s", path, bytes, strerror(errno));
}

// Also reports an unchecked fprintf to f that failed. EINVAL from fsync: a file that is on no disk (a pipe).
static inline void file_close(FILE *f, const char *path) {
    if (ferror(f)) fail(STATUS_FAILED, "%s: a write failed; is the disk full?", path);
    if (fflush(f) || (fsync(fileno(f)) && errno != EINVAL))
        fail(STATUS_FAILED, "%s: cannot write it to the end: %s", path, strerror(errno));
    if (fclose(f)) fail(STATUS_FAILED, "%s: cannot close it: %s", path, strerror(errno));
}

// What stood under the new name is replaced, if it is a file.
static inline void file_rename(const char *from, const char *to) {
    if (rename(from, to)) fail(STATUS_FAILED, "%s: cannot rename it to %s: %s", from, to, strerror(errno));
}

// bytes: the length without the 0; the caller frees.
static inline char *file_read(const char *path, size_t *bytes) {
    FILE *f = fopen(path, "rb");
    if (!f) fail(STATUS_DATA, "%s: cannot open it: %s", path, strerror(errno));
    char *text = NULL;
    size_t n = 0, room = 0;
    do {
        if (n + 1 >= room) {
            room = room ? 2 * room : 4096;
            text = (char *)realloc(text, room);
            if (!text) fail(STATUS_FAILED, "out of memory: %s needs more than %.1f MiB", path, n / 1048576.0);
        }
        n += fread(text + n, 1, room - n - 1, f);
        if (ferror(f)) fail(STATUS_DATA, "%s: cannot read it: %s", path, strerror(errno));
    } while (!feof(f));
    fclose(f);
    text[n] = 0;
    *bytes = n;
    return text;
}

static inline int file_exists(const char *path) { return access(path, F_OK) == 0; }

static inline void file_make_dirs(const char *path) {
    char part[4096];
    size_t n = strlen(path);
    if (n >= sizeof part) fail(STATUS_FAILED, "%.100s...: a path of %zu bytes is too long; use a shorter one", path, n);
    for (size_t i = 1; i <= n; i++) {
        if (i < n && path[i] != '/') continue;
        memcpy(part, path, i);
        part[i] = 0;
        struct stat st;
        if (mkdir(part, 0777) && !(stat(part, &st) == 0 && S_ISDIR(st.st_mode)))
            fail(STATUS_FAILED, "%s: cannot make the folder: %s", part, strerror(errno));
    }
}

// EINVAL: a file system that cannot sync folders, and does not need to.
static inline void file_sync_dir(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY);
    if (fd < 0 || (fsync(fd) && errno != EINVAL)) fail(STATUS_FAILED, "%s: cannot sync the folder: %s", path, strerror(errno));
    close(fd);
}

// Links are removed and not followed; a path that is not there is no error.
static inline void file_remove_tree(const char *path) {
    if (remove(path) == 0 || errno == ENOENT) return;
    DIR *dir = errno == ENOTEMPTY || errno == EEXIST ? opendir(path) : NULL;
    if (!dir) fail(STATUS_FAILED, "%s: cannot remove it: %s", path, strerror(errno));
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        size_t n = strlen(path) + strlen(entry->d_name) + 2;
        char *inside = (char *)xmalloc(n, "a path");
        snprintf(inside, n, "%s/%s", path, entry->d_name);
        file_remove_tree(inside);
        free(inside);
    }
    closedir(dir);
    if (remove(path)) fail(STATUS_FAILED, "%s: cannot remove it: %s", path, strerror(errno));
}

#endif
