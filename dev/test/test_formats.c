/*
Tests of json.h, file.h and safetensors.h, and of the known answers of hash.h and rng.h.

  gcc -std=gnu11 -O2 -Wall -Wextra -Werror -I. dev/test/test_formats.c -o test_formats -lm && ./test_formats

Ends with "N passed, N failed"; exit status 1 where any failed. Works in a fresh folder under $TMPDIR or /tmp, removed at the end.
*/
#include <sys/wait.h>
#include "check.h"
#include "curia/hash.h"
#include "curia/rng.h"
#include "curia/safetensors.h"

static char folder[512];

// The path of a name in the test's folder; stays valid, and the same name gives the same pointer.
static const char *in_folder(const char *name) {
    static char paths[64][1024];
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int i = 0;
    while (paths[i][0] && strcmp(paths[i], path)) i++;
    return strcpy(paths[i], path);
}

// Runs f(argument) in a child. Returns its exit status, -1 if a signal ended it; its stderr goes to text.
static int run_child(void (*f)(const char *), const char *argument, char *text, size_t n) {
    int ends[2];
    if (pipe(ends)) fail(STATUS_FAILED, "pipe: %s", strerror(errno));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        f(argument);
        exit(0);
    }
    close(ends[1]);
    size_t got = 0;
    for (ssize_t k; (k = read(ends[0], text + got, n - 1 - got)) > 0;) got += (size_t)k;
    text[got] = 0;
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// The child must end with the status, and say one line that holds every word.
static void check_fails(const char *what, void (*f)(const char *), const char *argument, int status, const char *word1,
                        const char *word2) {
    char text[4096];
    int got = run_child(f, argument, text, sizeof text);
    size_t n = strlen(text);
    int one = n > 0 && strchr(text, '\n') == text + n - 1;
    check(got == status && one && strstr(text, word1) && strstr(text, word2), "%s: status %d (expected %d), said: %s", what, got,
          status, text);
}

// ---------------------------------------------------------------------------------------------------------------- JSON

static void check_json_good(const char *text) {
    char error[512] = "";
    Json *j = json_parse(text, strlen(text), error, sizeof error);
    check(j != NULL, "json: refused %s: %s", text, error);
    json_free(j);
}

static void check_json_bad(const char *text, size_t bytes, const char *reason) {
    char error[512] = "";
    Json *j = json_parse(text, bytes, error, sizeof error);
    check(!j && strstr(error, reason), "json: %.60s: %s, expected '%s'", text, j ? "accepted" : error, reason);
    json_free(j);
}

static void check_json_string(const char *text, const char *expected) {
    char error[512] = "";
    Json *j = json_parse(text, strlen(text), error, sizeof error);
    check(j && j->type == JSON_STRING && !strcmp(j->text, expected), "json: %s: got %s", text, j ? j->text : error);
    json_free(j);
}

static void check_json_integer(const char *text, int is_integer, int64_t expected) {
    char error[512] = "";
    Json *j = json_parse(text, strlen(text), error, sizeof error);
    int64_t value = 0;
    int got = json_integer(j, &value);
    check(j && got == is_integer && value == expected, "json: integer %s: %d %lld %s", text, got, (long long)value, error);
    json_free(j);
}

static void test_json(void) {
    static const char *const good[] = {
        "null", " true ", "false", "0", "-0", "1", "-12.5e-3", "1E+2", "1e-999", "\"\"", "[]", "{}", "[ ]", "{ }", "[1,2 , 3]",
        "{\"a\":{\"b\":[{},[],\"\"]}}", "\t\r\n[null]\n", "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\x7f\"", "{\"\":1}",
        "{\"a\":1,\"A\":1}", "123456789012345678901234567890"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) check_json_good(good[i]);

    static const char *const bad[][2] = {
        {"", "byte 0: the text ends where"}, {"  ", "byte 2: the text ends where"}, {"nul", "byte 0: not a value"},
        {"True", "not a value"}, {"nullx", "byte 4: more text after"}, {"1 2", "more text after"}, {"{}}", "byte 2: more text"},
        {"[1]\n,", "more text"},
        {"01", "byte 1: more text"}, {"-", "ends where a value"}, {"+1", "not a value"}, {".5", "not a value"},
        {"1.", "after its point"}, {"1.e3", "after its point"}, {"1e", "in its exponent"}, {"1e+", "in its exponent"},
        {"0x10", "more text"}, {"NaN", "not a value"}, {"Infinity", "not a value"}, {"1e999", "too large for a double"},
        {"-1e400", "too large"}, {"[", "ends where a value"},
        {"[1", "expected ',' or ']'"}, {"[1,", "ends where a value"}, {"[1,]", "not a value"}, {"[,1]", "not a value"},
        {"[1 2]", "expected ',' or ']'"}, {"[1}", "expected ',' or ']'"}, {"{", "expected a key"}, {"{a:1}", "expected a key"},
        {"{'a':1}", "expected a key"}, {"{\"a\"}", "expected ':'"},
        {"{\"a\" 1}", "expected ':'"}, {"{\"a\":}", "not a value"}, {"{\"a\":1,}", "expected a key"},
        {"{\"a\":1]", "expected ',' or '}'"}, {"{\"a\":1,\"b\":2,\"a\":3}", "'a' twice"}, {"{\"a\":1,\"\\u0061\":3}", "'a' twice"},
        {"[{\"x\\ny\":1,\"x\\ny\":1}]", "'x?y' twice"},
        {"\"", "ends within a string"}, {"\"abc", "byte 4: the text ends within"}, {"\"\\", "escape"}, {"\"\\\"", "ends within"},
        {"\"\\x\"", "byte 1: an escape"}, {"\"\\u12\"", "escape"}, {"\"\\u12g4\"", "escape"}, {"\"\\U0041\"", "escape"},
        {"\"\\u0000\"", "\\u0000"}, {"\"a\nb\"", "byte 2: a control"},
        {"\"\\ud800\"", "surrogate"}, {"\"\\ud800x\"", "surrogate"}, {"\"\\ud800\\n\"", "surrogate"},
        {"\"\\ud800\\ud800\"", "surrogate"}, {"\"\\udc00\"", "surrogate"}, {"\"\\udc00\\ud800\"", "surrogate"},
        {"\"\\ud83d\\ude0\"", "surrogate"}, {"\"\\ud83d\\ue000\"", "surrogate"}, {"// c\n1", "not a value"},
        {"\xef\xbb\xbf{}", "not a value"}, {"\"\x80\"", "byte 1: not UTF-8"}, {"\"\xc0\xaf\"", "not UTF-8"},
        {"\"\xc3\"", "not UTF-8"}, {"\"\xc3", "not UTF-8"}, {"\"\xe0\x80\xaf\"", "not UTF-8"}, {"\"\xed\xa0\x80\"", "not UTF-8"},
        {"\"\xf0\x80\x80\xaf\"", "not UTF-8"}, {"\"\xf4\x90\x80\x80\"", "not UTF-8"}, {"\"\xf8\x88\x80\x80\x80\"", "not UTF-8"},
        {"\"\xff\"", "not UTF-8"}, {"\"\xe2\x82\"", "not UTF-8"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) check_json_bad(bad[i][0], strlen(bad[i][0]), bad[i][1]);
    check_json_bad("1\0", 2, "byte 1: more text");
    check_json_bad("\"a\0b\"", 5, "byte 2: a control character");
    check_json_bad("[1,\0]", 5, "not a value");
    for (char c = 1; c < 0x20; c++) {
        char text[] = {'"', c, '"'};
        check_json_bad(text, 3, "byte 1: a control character");
    }

    check_json_string("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t");
    check_json_string("\"\\u0041\\u00e9\\u20AC\\uffff\"", "A\xc3\xa9\xe2\x82\xac\xef\xbf\xbf");
    check_json_string("\"\\u007f\\u0080\\u07ff\\u0800\"", "\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80");
    check_json_string("\"\\ud83d\\ude00\\ud800\\udc00\\udbff\\udfff\"", "\xf0\x9f\x98\x80\xf0\x90\x80\x80\xf4\x8f\xbf\xbf");
    check_json_string("\"\xf0\x9f\x98\x80 \xc3\xa9\"", "\xf0\x9f\x98\x80 \xc3\xa9");

    check_json_integer("9223372036854775807", 1, INT64_MAX);
    check_json_integer("-9223372036854775808", 1, INT64_MIN);
    check_json_integer("9007199254740993", 1, 9007199254740993);
    check_json_integer("9223372036854775808", 0, 0);
    check_json_integer("-9223372036854775809", 0, 0);
    check_json_integer("1.0", 0, 0);
    check_json_integer("1e3", 0, 0);
    check_json_integer("\"1\"", 0, 0);
    check_json_integer("null", 0, 0);

    char error[512];
    const char *text = "{\"a\": [1, -2.5, \"x\", true], \"b\": {\"c\": null}, \"n\": 17}";
    Json *j = json_parse(text, strlen(text), error, sizeof error);
    if (check(j != NULL, "json: tree: %s", error)) {
        const Json *a = json_get(j, "a");
        check(j->type == JSON_OBJECT && j->count == 3 && !strcmp(j->keys[1], "b"), "json: tree: root");
        check(a && a->type == JSON_ARRAY && a->count == 4 && a->children[0].number == 1 && a->children[1].number == -2.5,
              "json: tree: array");
        check(a && !strcmp(a->children[1].text, "-2.5") && !strcmp(a->children[2].text, "x") && a->children[3].type == JSON_TRUE,
              "json: tree: text");
        check(json_get(json_get(j, "b"), "c")->type == JSON_NULL && !json_get(json_get(j, "z"), "c") && !json_get(a, "c"),
              "json: json_get");
        check(!strcmp(json_get(j, "n")->text, "17"), "json: a number before '}'");
        json_free(j);
    }

    // Nesting: 64 levels pass, 65 and a million do not, open or closed.
    static char deep[2000001];
    static const size_t levels[] = {64, 65, 1000000};
    for (int i = 0; i < 3; i++) {
        memset(deep, '[', levels[i]);
        memset(deep + levels[i], ']', levels[i]);
        Json *d = json_parse(deep, 2 * levels[i], error, sizeof error);
        check(i ? !d && strstr(error, "byte 64: more than 64 levels") : d != NULL, "json: %zu levels", levels[i]);
        json_free(d);
    }
    check_json_bad(deep, 1000000, "more than 64 levels");
    // Every key of a large object is compared with every other, and quickly.
    size_t n = 0;
    for (int i = 0; i < 100000; i++) n += (size_t)sprintf(deep + n, "%c\"k%d\":%d", i ? ',' : '{', i, i);
    deep[n] = '}';
    double from = seconds_now();
    Json *large = json_parse(deep, n + 1, error, sizeof error);
    check(large && large->count == 100000 && seconds_now() - from < 5, "json: 100000 keys");
    json_free(large);
    memcpy(deep + n, ",\"k5\":0}", 8);
    check_json_bad(deep, n + 8, "'k5' twice");

    // No prefix and no changed byte of a text crashes the parser, and each message stays one line.
    const char *sample = "{\"dt\\u00e9\\ud83d\\ude00\":[1,-2.5e3,true,null,{\"a\":\"b\\n\"}],\"\xc3\xa9\":false}";
    size_t length = strlen(sample);
    for (size_t cut = 0; cut < length; cut++) {
        char *exact = (char *)malloc(cut ? cut : 1);            // a heap block of that very size, for AddressSanitizer
        memcpy(exact, sample, cut);
        Json *d = json_parse(exact, cut, error, sizeof error);
        check(!d && !strchr(error, '\n'), "json: the first %zu bytes", cut);
        json_free(d);
        free(exact);
    }
    int crashes = 0;
    for (size_t at = 0; at < length; at++) {
        for (int byte = 0; byte < 256; byte++) {
            char changed[256];
            memcpy(changed, sample, length);
            changed[at] = (char)byte;
            error[0] = 0;
            Json *d = json_parse(changed, length, error, sizeof error);
            crashes += d ? error[0] != 0 : !error[0] || strchr(error, '\n') != NULL;
            json_free(d);
        }
    }
    check(crashes == 0, "json: %d changed texts without a clear answer", crashes);

    // What is written reads back.
    const char *hard = "a\"b\\c\n\t\r\x01\x1f\x7f/\xc3\xa9\xf0\x9f\x98\x80";
    char *written = NULL;
    size_t bytes;
    FILE *f = open_memstream(&written, &bytes);
    json_write_string(f, hard);
    fclose(f);
    check_json_string(written, hard);
    check(!strcmp(written, "\"a\\\"b\\\\c\\n\\t\\u000d\\u0001\\u001f\\u007f/\xc3\xa9\xf0\x9f\x98\x80\""),
          "json: written %s", written);
    free(written);
    f = open_memstream(&written, &bytes);
    json_write_string(f, "\xff\xc3");
    fclose(f);
    check_json_string(written, "\xef\xbf\xbd\xef\xbf\xbd");
    free(written);
}

// --------------------------------------------------------------------------------------------------------------- files

static void child_json_read(const char *path) { json_free(json_read(path)); }
static void child_create(const char *path) { file_create(path); }
static void child_make_dirs(const char *path) { file_make_dirs(path); }
static void child_sync(const char *path) { file_sync_dir(path); }
static void child_join(const char *name) {
    char path[PATH_SIZE];
    path_join(path, "dir", name);
}
static void child_full(const char *path) {
    FILE *f = file_create(path);
    fprintf(f, "unchecked");
    file_close(f, path);
}

static void test_file(void) {
    static char big[10000];
    for (size_t i = 0; i < sizeof big; i++) big[i] = (char)(i * 7);
    for (size_t n = 0; n <= sizeof big; n = n ? n * 2 + 1 : 1) {                // passes 4095, where the buffer grows
        FILE *f = file_create(in_folder("plain"));
        file_write(f, in_folder("plain"), big, n);
        file_close(f, in_folder("plain"));
        size_t bytes;
        char *text = file_read(in_folder("plain"), &bytes);
        check(bytes == n && !memcmp(text, big, n) && text[n] == 0, "file: %zu bytes", n);
        free(text);
    }
    char path[PATH_SIZE], name[PATH_SIZE];
    check(!strcmp(path_join(path, "dir", "name"), "dir/name"), "file: path_join");
    memset(name, 'x', sizeof name);
    name[PATH_SIZE - 5] = 0;
    check(strlen(path_join(path, "dir", name)) == PATH_SIZE - 1, "file: the longest path");
    memcpy(name + PATH_SIZE - 5, "x", 2);
    check_fails("file: path_join", child_join, name, STATUS_FAILED, "dir...: the path is too long", "");
    file_make_dirs(in_folder("a/b//c/"));
    file_make_dirs(in_folder("a/b/c"));
    check(file_exists(in_folder("a/b/c")), "file: folders");
    FILE *f = file_create(in_folder("a/b/c/x.json"));
    fprintf(f, "{\"x\": 1}\n");
    file_close(f, in_folder("a/b/c/x.json"));
    file_sync_dir(in_folder("a/b/c"));
    Json *j = json_read(in_folder("a/b/c/x.json"));
    check(json_get(j, "x") != NULL, "file: json_read");
    json_free(j);
    check(symlink(in_folder("plain"), in_folder("a/link")) == 0 && symlink(folder, in_folder("a/up")) == 0, "file: links");
    file_remove_tree(in_folder("a"));
    check(!file_exists(in_folder("a")) && file_exists(in_folder("plain")), "file: a tree is removed, and links are not followed");
    file_remove_tree(in_folder("a"));
    check_fails("file: json_read of no JSON", child_json_read, in_folder("plain"), STATUS_DATA, "plain: is not JSON: byte 19",
                "not UTF-8");
    check_fails("file: json_read of nothing", child_json_read, in_folder("none"), STATUS_DATA, "none: cannot open it",
                "No such file");
    check_fails("file: json_read of a folder", child_json_read, folder, STATUS_DATA, "cannot read it", "directory");
    check_fails("file: no folder for it", child_create, in_folder("none/x"), STATUS_FAILED, "none/x: cannot create",
                "No such file");
    check_fails("file: a folder where a file is", child_make_dirs, in_folder("plain/x"), STATUS_FAILED, "plain: cannot make", "");
    check_fails("file: sync of nothing", child_sync, in_folder("none"), STATUS_FAILED, "none: cannot sync", "");
    check_fails("file: full disk", child_full, "/dev/full", STATUS_FAILED, "/dev/full: cannot write", "No space");
    file_remove_tree(in_folder("plain"));
}

// --------------------------------------------------------------------------------------------------------- safetensors

// A file of N, a header and `data` bytes 0, 1, 2...; returns its path.
static const char *write_raw(uint64_t n, const char *header, size_t header_bytes, size_t data) {
    const char *path = in_folder("raw.safetensors");
    FILE *f = file_create(path);
    file_write(f, path, &n, 8);
    file_write(f, path, header, header_bytes);
    for (size_t i = 0; i < data; i++) fputc((int)(i & 255), f);
    fclose(f);
    return path;
}

// reason NULL: the file must be accepted.
static void check_header(const char *header, size_t data, const char *reason) {
    char why[1024] = "";
    int bad = safetensors_check(write_raw(strlen(header), header, strlen(header), data), why, sizeof why);
    check(reason ? bad == -1 && strstr(why, reason) && !strchr(why, '\n') : bad == 0, "safetensors: %s: %s, expected %s", header,
          bad ? why : "accepted", reason ? reason : "to be accepted");
}

#define T(name, dtype, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" #begin "," #end "]}"

static void test_headers(void) {
    char why[1024];
    check_header("{}", 0, NULL);
    check_header("{}  ", 0, NULL);
    check_header("{" T("a", "F32", "2", 0, 8) "}", 8, NULL);
    check_header("{" T("a", "F32", "", 0, 4) "}", 4, NULL);
    check_header("{" T("a", "F32", "0", 0, 0) "}", 0, NULL);
    check_header("{" T("a", "F32", "3,0,2", 0, 0) "," T("b", "U8", "3", 0, 3) "," T("c", "I64", "0", 3, 3) "}", 3, NULL);
    check_header("{" T("b", "U8", "3", 4, 7) "," T("a", "F32", "1,1", 0, 4) "}", 7, NULL);
    check_header("{\"__metadata__\":{\"format\":\"pt\"}," T("a", "U8", "1", 0, 1) "}", 1, NULL);
    check_header("{\"__metadata__\":null," T("a", "U8", "1", 0, 1) "}", 1, NULL);
    check_header("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"more\":[]}}", 1, NULL);
    check_header("{" T("a", "U8", "1,1,1,1,1,1,1,1", 0, 1) "}", 1, NULL);
    check_header("{" T("a", "F4", "4", 0, 2) "," T("b", "F6_E2M3", "4", 2, 5) "," T("c", "F8_E8M0", "1", 5, 6) "}", 6, NULL);

    check_header("", 0, "the header is not JSON: byte 0");
    check_header(" {}", 0, "byte 0: expected '{'");
    check_header("[]", 0, "byte 0: expected '{'");
    check_header("{}x", 0, "byte 2: more text");
    check_header("{\"a\":\xff}", 0, "not UTF-8");
    check_header("{" T("a", "F32", "1", 0, 4) "," T("a", "F32", "1", 4, 8) "}", 8, "'a' twice");
    check_header("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "'dtype' twice");
    check_header("{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "'a' twice");
    check_header("{\"__metadata__\":[]}", 0, "__metadata__ is not an object");
    check_header("{\"__metadata__\":{\"a\":1}}", 0, "__metadata__: 'a' is not a string");
    check_header("{\"a\":1}", 0, "tensor 'a': expected an object");
    check_header("{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor 'a': expected an object");
    check_header("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "tensor 'a': expected an object");
    check_header("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "tensor 'a': expected an object");
    check_header("{\"a\":{\"dtype\":8,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "expected an object");
    check_header("{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1, "expected an object");
    check_header("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":1}}", 1, "expected an object");
    check_header("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "tensor 'a': data_offsets");
    check_header("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,1]}}", 1, "data_offsets");
    check_header("{" T("a", "Q7", "1", 0, 1) "}", 1, "tensor 'a': unknown dtype 'Q7'");
    check_header("{" T("a\\nb", "f32", "1", 0, 4) "}", 4, "tensor 'a?b': unknown dtype 'f32'");
    check_header("{" T("a", "U8", "4", 4, 0) "}", 4, "begin <= end");
    check_header("{" T("a", "U8", "1", -1, 0) "}", 0, "data_offsets");
    check_header("{" T("a", "U8", "0", -0, 0) "}", 0, "data_offsets");
    check_header("{" T("a", "U8", "1", 0.0, 1) "}", 1, "data_offsets");
    check_header("{" T("a", "U8", "1", 0, 1e0) "}", 1, "data_offsets");
    check_header("{" T("a", "U8", "1", 0, "1") "}", 1, "data_offsets");
    check_header("{" T("a", "U8", "1", 18446744073709551616, 18446744073709551617) "}", 1, "data_offsets");
    check_header("{" T("a", "U8", "-1", 0, 1) "}", 1, "dimension 0 of its shape");
    check_header("{" T("a", "U8", "1,1.0", 0, 1) "}", 1, "dimension 1 of its shape");
    check_header("{" T("a", "U8", "18446744073709551617", 0, 1) "}", 1, "dimension 0 of its shape");
    check_header("{" T("a", "U8", "1,1,1,1,1,1,1,1,1", 0, 1) "}", 1, "9 dimensions");
    check_header("{" T("a", "U8", "4294967296,4294967296", 0, 0) "}", 0, "overflows");
    check_header("{" T("a", "U8", "4294967296,4294967297", 0, 4294967296) "}", 0, "overflows");
    check_header("{" T("a", "U8", "9223372036854775807,3,0", 0, 0) "}", 0, "overflows");
    check_header("{" T("a", "F64", "2305843009213693952", 0, 0) "}", 0, "overflows");
    check_header("{" T("a", "F4", "3", 0, 1) "}", 1, "no whole number of bytes");
    check_header("{" T("a", "F32", "2", 0, 4) "}", 4, "tensor 'a': its shape and dtype need 8 bytes, and its data_offsets give 4");
    check_header("{" T("a", "F32", "1", 0, 8) "}", 8, "need 4 bytes");
    check_header("{" T("a", "U8", "4", 0, 4) "," T("b", "U8", "4", 2, 6) "}", 6,
                 "tensor 'b': begins at byte 2 of the data, within another");
    check_header("{" T("a", "U8", "4", 0, 4) "," T("b", "U8", "4", 0, 4) "}", 4, "within another");
    check_header("{" T("a", "U8", "4", 0, 4) "," T("b", "U8", "4", 5, 9) "}", 9,
                 "tensor 'b': begins at byte 5 of the data, after a hole");
    check_header("{" T("a", "U8", "4", 1, 5) "}", 5, "after a hole");
    check_header("{" T("a", "U8", "0", 3, 3) "}", 3, "after a hole");
    check_header("{" T("a", "U8", "4", 0, 4) "," T("z", "U8", "0", 2, 2) "}", 4,
                 "tensor 'z': begins at byte 2 of the data, within");
    check_header("{" T("a", "U8", "4", 0, 4) "}", 5, "has bytes at its end");
    check_header("{}", 1, "has bytes at its end");
    check_header("{" T("a", "U8", "4", 0, 4) "}", 3, "is cut short");

    static const uint64_t lengths[] = {3, 100000001, 0xffffffffffffffff, 0xfffffffffffffff8, (uint64_t)1 << 63,
                                       (uint64_t)INT64_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        int bad = safetensors_check(write_raw(lengths[i], "{}", 2, 0), why, sizeof why);
        check(bad == -1 && strstr(why, "its header should have"), "safetensors: N = %llu: %s", (unsigned long long)lengths[i], why);
    }
    check(safetensors_check(write_raw(0x0000080804034b50, "xxxx", 4, 9), why, sizeof why) == -1 && strstr(why, "pickle"),
          "safetensors: zip: %s", why);
    check(safetensors_check(write_raw(0x71006371025d0280, "xxxx", 4, 9), why, sizeof why) == -1 && strstr(why, "pickle"),
          "safetensors: pickle: %s", why);
    // A header of 100 MB and more is refused for its length even where the file has it.
    const char *sparse = in_folder("sparse.safetensors");
    FILE *f = file_create(sparse);
    uint64_t n = 100000001;
    file_write(f, sparse, &n, 8);
    check(fseeko(f, 8 + 100000001, SEEK_SET) == 0, "safetensors: seek");
    fputc('x', f);
    fclose(f);
    check(safetensors_check(sparse, why, sizeof why) == -1 && strstr(why, "its header should have 100000001"),
          "safetensors: 100 MB header: %s", why);
    file_remove_tree(sparse);
    check(safetensors_check(folder, why, sizeof why) == -1 && strstr(why, "not a file"), "safetensors: a folder: %s", why);
    check(safetensors_check(in_folder("none"), why, sizeof why) == -1 && strstr(why, "No such file"),
          "safetensors: nothing: %s", why);
}

// Writes one tensor of every type, `seven` in pieces, the order of the types mixed.
static void write_all_types(const char *path) {
    static const char *const metadata[] = {"curia.config", "{\"a\": \"\xc3\xa9\n\"}", "step", "7", NULL};
    SafeWriter w;
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)(i * 37 + 1);
    safetensors_write_begin(&w, path, metadata);
    for (int d = 0; d < DTYPE_COUNT; d++) {
        static const int64_t shape[] = {2, 1, 4};
        safetensors_write_declare(&w, dtype_name((Dtype)d), (Dtype)d, 3, shape);
    }
    static const int64_t empty[] = {3, 0}, seven[] = {7};
    safetensors_write_declare(&w, "seven", DTYPE_U8, 1, seven);
    safetensors_write_declare(&w, "scalar \"\xc3\xa9\\", DTYPE_F32, 0, NULL);
    safetensors_write_declare(&w, "empty", DTYPE_F32, 2, empty);
    for (int d = 0; d < DTYPE_COUNT; d++) safetensors_write_data(&w, dtype_name((Dtype)d), bytes, (size_t)dtype_bits((Dtype)d));
    for (int i = 0; i < 7; i++) safetensors_write_data(&w, "seven", bytes + i, 1);
    safetensors_write_data(&w, "scalar \"\xc3\xa9\\", bytes, 4);
    safetensors_write_data(&w, "empty", NULL, 0);
    safetensors_write_end(&w);
}

static const char *child_tensor;
static void child_open(const char *path) { safetensors_close(safetensors_open(path)); }
static void child_read(const char *path) {
    SafeTensors *st = safetensors_open(path);
    const SafeTensor *t = safetensors_find(st, child_tensor);
    double out[64];
    if (t->dtype == DTYPE_I64 || t->dtype == DTYPE_U8) safetensors_read_f32(st, t, (float *)out);
    else if (t->dtype == DTYPE_BOOL) safetensors_read_f64(st, t, out);
    else safetensors_read_i64(st, t, (int64_t *)out);
}

static void test_types(void) {
    const char *path = in_folder("types.safetensors");
    write_all_types(path);
    SafeTensors *st = safetensors_open(path);
    uint64_t header;
    memcpy(&header, st->map, 8);
    check(header % 8 == 0 && st->count == DTYPE_COUNT + 3, "safetensors: padding, count");
    check(!strcmp(safetensors_metadata(st, "format"), "pt") && !strcmp(safetensors_metadata(st, "step"), "7") &&
          !strcmp(safetensors_metadata(st, "curia.config"), "{\"a\": \"\xc3\xa9\n\"}") && !safetensors_metadata(st, "none"),
          "safetensors: metadata");
    for (int d = 0; d < DTYPE_COUNT; d++) {
        const SafeTensor *t = safetensors_find(st, dtype_name((Dtype)d));
        int good = t && t->dtype == (Dtype)d && t->rank == 3 && t->shape[0] == 2 && t->shape[1] == 1 && t->shape[2] == 4 &&
                   t->bytes == (size_t)dtype_bits((Dtype)d) && safetensors_elements(t) == 8;
        for (size_t i = 0; good && i < t->bytes; i++) good = st->map[t->offset + i] == (uint8_t)(i * 37 + 1);
        check(good, "safetensors: round trip of %s", dtype_name((Dtype)d));
        check(t && (dtype_bits((Dtype)d) < 8 || t->offset % ((size_t)dtype_bits((Dtype)d) / 8) == 0),
              "safetensors: alignment of %s", dtype_name((Dtype)d));
    }
    const SafeTensor *seven = safetensors_find(st, "seven"), *empty = safetensors_find(st, "empty"),
                     *scalar = safetensors_find(st, "scalar \"\xc3\xa9\\");
    int64_t values[7];
    safetensors_read_i64(st, seven, values);
    check(values[0] == 1 && values[6] == 223, "safetensors: pieces");
    check(empty && empty->bytes == 0 && empty->rank == 2 && safetensors_elements(empty) == 0, "safetensors: empty tensor");
    float untouched = 3;
    safetensors_read_f32(st, empty, &untouched);
    check(untouched == 3, "safetensors: nothing is read from an empty tensor");
    check(scalar && scalar->rank == 0 && scalar->bytes == 4 && safetensors_elements(scalar) == 1, "safetensors: scalar");
    check(!safetensors_find(st, "") && !safetensors_find(st, "F3") && !safetensors_find(st, "zzz") &&
          !safetensors_find(st, "__metadata__"), "safetensors: find");
    int sorted = 1;
    for (int i = 1; i < st->count; i++) sorted &= strcmp(st->tensors[i - 1].name, st->tensors[i].name) < 0;
    check(sorted, "safetensors: sorted by name");
    write_all_types(in_folder("again.safetensors"));
    SafeTensors *again = safetensors_open(in_folder("again.safetensors"));
    check(again->size == st->size && !memcmp(again->map, st->map, st->size), "safetensors: the same calls give the same bytes");
    safetensors_close(again);
    safetensors_close(st);

    static const char *const refused[][3] = {
        {"I64", "is I64", "expected F32"}, {"U8", "is U8", "expected F32"}, {"BOOL", "is BOOL", "expected F32"},
        {"F32", "is F32", "expected an integer"}, {"U64", "is U64", "expected an integer"},
        {"C64", "is C64", "expected an integer"}, {"F8_E4M3", "is F8_E4M3", "expected an integer"},
        {"F4", "is F4", "expected an integer"}};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        child_tensor = refused[i][0];
        check_fails("safetensors: read", child_read, path, STATUS_DATA, refused[i][1], refused[i][2]);
    }
}

static void write_one(const char *path, const char *name, Dtype dtype, int64_t elements, const void *data) {
    SafeWriter w;
    safetensors_write_begin(&w, path, NULL);
    safetensors_write_declare(&w, name, dtype, 1, &elements);
    safetensors_write_data(&w, name, data, (size_t)elements * (size_t)dtype_bits(dtype) / 8);
    safetensors_write_end(&w);
}

// 2^-24 times an integer, or a power of two times 1.m: the value of a binary16 from its definition.
static double f16_by_definition(int bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double size = exponent == 0 ? ldexp(mantissa, -24) : exponent < 31 ? ldexp(1024 + mantissa, exponent - 25)
                  : mantissa ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}

static double bf16_by_definition(int bits) {
    int exponent = bits >> 7 & 255, mantissa = bits & 127;
    double size = exponent == 0 ? ldexp(mantissa, -133) : exponent < 255 ? ldexp(128 + mantissa, exponent - 134)
                  : mantissa ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}

static int same_number(double a, double b) { return isnan(a) ? isnan(b) : a == b && signbit(a) == signbit(b); }

// Every binary16 and every bfloat16 through a file, against their definitions; and the other conversions.
static void test_values(void) {
    const char *path = in_folder("values.safetensors");
    static uint16_t all[65536];
    static float f32[65536];
    static double f64[65536];
    for (int i = 0; i < 65536; i++) all[i] = (uint16_t)i;
    for (int brain = 0; brain < 2; brain++) {
        write_one(path, "x", brain ? DTYPE_BF16 : DTYPE_F16, 65536, all);
        SafeTensors *st = safetensors_open(path);
        safetensors_read_f32(st, safetensors_find(st, "x"), f32);
        safetensors_read_f64(st, safetensors_find(st, "x"), f64);
        int wrong = 0;
        for (int i = 0; i < 65536; i++) {
            double expected = brain ? bf16_by_definition(i) : f16_by_definition(i);
            wrong += !same_number(expected, f64[i]) || !same_number(expected, f32[i]);
        }
        check(wrong == 0, "safetensors: %d wrong values of %s", wrong, brain ? "BF16" : "F16");
        safetensors_close(st);
    }
    static const double reals[] = {0, -0.0, 1, -1.5, 0.1, 1e-310, 1e300, 1 + 0x1p-24, 1 + 3 * 0x1p-24, 123456789.123};
    write_one(path, "x", DTYPE_F64, 10, reals);
    SafeTensors *st = safetensors_open(path);
    safetensors_read_f32(st, safetensors_find(st, "x"), f32);
    safetensors_read_f64(st, safetensors_find(st, "x"), f64);
    for (int i = 0; i < 10; i++)
        check(same_number(f64[i], reals[i]) && same_number(f32[i], (float)reals[i]), "safetensors: F64 %g", reals[i]);
    safetensors_close(st);
    static const float singles[] = {0, -0.0f, 1e-45f, 3.4e38f, INFINITY, 0.1f};
    write_one(path, "x", DTYPE_F32, 6, singles);
    st = safetensors_open(path);
    safetensors_read_f32(st, safetensors_find(st, "x"), f32);
    safetensors_read_f64(st, safetensors_find(st, "x"), f64);
    for (int i = 0; i < 6; i++)
        check(same_number(f64[i], singles[i]) && same_number(f32[i], singles[i]), "safetensors: F32 %g", singles[i]);
    safetensors_close(st);
    static const struct { Dtype dtype; int count; int64_t expected[8]; } integers[] = {
        {DTYPE_I64, 1, {INT64_MAX - 1}}, {DTYPE_I32, 2, {-2, 0x7fffffff}}, {DTYPE_I16, 4, {-2, -1, -1, 0x7fff}},
        {DTYPE_I8, 8, {-2, -1, -1, -1, -1, -1, -1, 127}}, {DTYPE_U32, 2, {0xfffffffe, 0x7fffffff}},
        {DTYPE_U16, 4, {0xfffe, 0xffff, 0xffff, 0x7fff}}, {DTYPE_U8, 8, {254, 255, 255, 255, 255, 255, 255, 127}},
        {DTYPE_BOOL, 8, {254, 255, 255, 255, 255, 255, 255, 127}}};
    static const uint8_t raw[8] = {0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f};
    for (size_t k = 0; k < sizeof integers / sizeof *integers; k++) {
        int64_t out[8];
        write_one(path, "x", integers[k].dtype, integers[k].count, raw);
        st = safetensors_open(path);
        safetensors_read_i64(st, safetensors_find(st, "x"), out);
        check(!memcmp(out, integers[k].expected, (size_t)integers[k].count * 8), "safetensors: integers of %s",
              dtype_name(integers[k].dtype));
        safetensors_close(st);
    }
    // Data that is aligned to nothing (a foreign writer that does not pad) reads the same.
    const char *odd = "{" T("x", "F64", "2", 1, 17) "," T("u", "U8", "1", 0, 1) "} ";
    for (size_t pad = 0; pad < 2; pad++) {
        st = safetensors_open(write_raw(strlen(odd) - pad, odd, strlen(odd) - pad, 17));
        safetensors_read_f64(st, safetensors_find(st, "x"), f64);
        uint8_t bytes[16];
        memcpy(bytes, f64, 16);
        check(bytes[0] == 1 && bytes[15] == 16, "safetensors: unaligned");
        safetensors_close(st);
    }
}

// Every truncation is refused; every changed byte is refused or gives a file that can be read to its last byte.
static void test_damage(void) {
    const char *path = in_folder("types.safetensors"), *damaged = in_folder("damaged.safetensors");
    size_t bytes;
    char *whole = file_read(path, &bytes), why[1024];
    for (size_t cut = 0; cut < bytes; cut++) {
        FILE *f = fopen(damaged, "wb");
        file_write(f, damaged, whole, cut);
        fclose(f);
        why[0] = 0;
        check(safetensors_check(damaged, why, sizeof why) == -1 && why[0] && !strchr(why, '\n'),
              "safetensors: cut to %zu of %zu bytes", cut, bytes);
    }
    int fd = open(damaged, O_RDWR | O_CREAT | O_TRUNC, 0666), unclear = 0, opened = 0;
    check(write(fd, whole, bytes) == (ssize_t)bytes, "safetensors: write");
    for (size_t at = 0; at < bytes; at++) {
        for (int bit = 0; bit < 8; bit++) {
            char changed = (char)(whole[at] ^ 1 << bit);
            unclear += pwrite(fd, &changed, 1, (off_t)at) != 1;
            why[0] = 0;
            SafeTensors *st = safetensors_load(damaged, why, sizeof why);
            unclear += !st && (!why[0] || strchr(why, '\n'));
            for (int i = 0; st && i < st->count; i++) {
                const SafeTensor *t = &st->tensors[i];
                static double out[64];
                unclear += t->offset + t->bytes > st->size || safetensors_elements(t) > 64;
                if (t->dtype == DTYPE_F32 || t->dtype == DTYPE_F64 || t->dtype == DTYPE_F16 || t->dtype == DTYPE_BF16)
                    safetensors_read_f64(st, t, out);
                if (t->dtype == DTYPE_I64 || t->dtype == DTYPE_U8) safetensors_read_i64(st, t, (int64_t *)out);
            }
            opened += st != NULL;
            safetensors_close(st);
        }
        unclear += pwrite(fd, whole + at, 1, (off_t)at) != 1;
    }
    close(fd);
    check(unclear == 0, "safetensors: %d changed files without a clear answer", unclear);
    check(opened > 0, "safetensors: a changed value is no error");
    check(safetensors_check(damaged, why, sizeof why) == 0, "safetensors: restored: %s", why);
    FILE *f = file_create(damaged);
    file_write(f, damaged, whole, bytes / 2);
    file_close(f, damaged);
    check_fails("safetensors: open", child_open, damaged, STATUS_DATA, "damaged.safetensors: ", "cut short");
    free(whole);
}

static void child_writer(const char *what) {
    SafeWriter w;
    static const float data[4];
    static const int64_t two[] = {2};
    safetensors_write_begin(&w, !strcmp(what, "full") ? "/dev/full" : in_folder("w.safetensors"), NULL);
    safetensors_write_declare(&w, "a", DTYPE_F32, 1, two);
    safetensors_write_declare(&w, !strcmp(what, "twice") ? "a" : "b", DTYPE_F32, 1, two);
    if (!strcmp(what, "order")) safetensors_write_data(&w, "b", data, 8);
    safetensors_write_data(&w, "a", data, 4);
    if (!strcmp(what, "early")) safetensors_write_data(&w, "b", data, 8);
    if (!strcmp(what, "late")) safetensors_write_declare(&w, "c", DTYPE_F32, 1, two);
    safetensors_write_data(&w, "a", data, !strcmp(what, "much") ? 8 : 4);
    if (!strcmp(what, "missing")) safetensors_write_end(&w);
    safetensors_write_data(&w, "b", data, 8);
    if (!strcmp(what, "more")) safetensors_write_data(&w, "b", data, 8);
    safetensors_write_end(&w);
}

static void child_model(const char *path) {
    SafeModel m = safetensors_open_model(path);
    safetensors_close_model(&m);
}

static void write_text(const char *path, const char *text) {
    FILE *f = file_create(path);
    fputs(text, f);
    file_close(f, path);
}

static void test_writer_and_models(void) {
    char text[1024];
    check(run_child(child_writer, "right", text, sizeof text) == 0 && !text[0], "safetensors: writer: %s", text);
    check_fails("safetensors: declared twice", child_writer, "twice", STATUS_FAILED, "w.safetensors", "'a' is declared twice");
    check_fails("safetensors: declared late", child_writer, "late", STATUS_FAILED, "w.safetensors", "'c' is declared after data");
    check_fails("safetensors: wrong order", child_writer, "order", STATUS_FAILED, "w.safetensors",
                "8 bytes of tensor 'b', where 'a' needs 8");
    check_fails("safetensors: too early", child_writer, "early", STATUS_FAILED, "w.safetensors", "'b', where 'a' needs 4");
    check_fails("safetensors: too much", child_writer, "much", STATUS_FAILED, "w.safetensors", "'a', where 'a' needs 4");
    check_fails("safetensors: one more", child_writer, "more", STATUS_FAILED, "w.safetensors", "'b', where '(the end)'");
    check_fails("safetensors: missing data", child_writer, "missing", STATUS_FAILED, "w.safetensors",
                "'b' was not written to its end");
    check_fails("safetensors: full disk", child_writer, "full", STATUS_FAILED, "/dev/full: ", "No space");

    static const float one = 1, two = 2;
    file_make_dirs(in_folder("model"));
    check_fails("model: empty folder", child_model, in_folder("model"), STATUS_DATA, "model: has neither", "pickle");
    check_fails("model: no folder", child_model, in_folder("none"), STATUS_DATA, "none: cannot open it", "");
    write_one(in_folder("model/s1.safetensors"), "a", DTYPE_F32, 1, &one);
    write_one(in_folder("model/s2.safetensors"), "b", DTYPE_F32, 1, &two);
    const char *index = in_folder("model/model.safetensors.index.json");
    write_text(index, "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}}");
    SafeModel m = safetensors_open_model(in_folder("model"));
    const SafeTensors *file;
    float value = 0;
    const SafeTensor *t = safetensors_model_find(&m, "b", &file);
    if (check(m.count == 2 && t && !safetensors_model_find(&m, "c", &(const SafeTensors *){NULL}), "model: shards"))
        safetensors_read_f32(file, t, &value);
    check(value == 2, "model: a value of the second shard");
    safetensors_close_model(&m);
    static const char *const bad[][2] = {
        {"{\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s1.safetensors\"}}", "holds tensor 'b', and it does not"},
        {"{\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s3.safetensors\"}}", "s3.safetensors: cannot open it"},
        {"{\"weight_map\":{\"a\":\"../s1.safetensors\"}}", "entry 0 is not the name"},
        {"{\"weight_map\":{\"a\":1}}", "entry 0 is not the name"}, {"{\"weight_map\":[]}", "expected an object weight_map"},
        {"{", "is not JSON"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_text(index, bad[i][0]);
        check_fails("model: index", child_model, in_folder("model"), STATUS_DATA, "model/", bad[i][1]);
    }
    write_one(in_folder("model/s2.safetensors"), "a", DTYPE_F32, 1, &two);
    write_text(index, "{\"weight_map\":{\"a\":\"s1.safetensors\"}}");
    child_model(in_folder("model"));
    SafeWriter w;
    safetensors_write_begin(&w, in_folder("model/s1.safetensors"), NULL);
    safetensors_write_declare(&w, "a", DTYPE_F32, 0, NULL);
    safetensors_write_declare(&w, "extra", DTYPE_F32, 0, NULL);
    safetensors_write_data(&w, "a", &one, 4);
    safetensors_write_data(&w, "extra", &one, 4);
    safetensors_write_end(&w);
    check_fails("model: a tensor that the index lacks", child_model, in_folder("model"), STATUS_DATA, "names 1 tensors", "hold 2");
    write_one(in_folder("model/model.safetensors"), "whole", DTYPE_F32, 1, &one);
    for (int i = 0; i < 2; i++) {
        m = safetensors_open_model(in_folder(i ? "model/model.safetensors" : "model"));
        check(m.count == 1 && safetensors_model_find(&m, "whole", &file),
              "model: model.safetensors comes first, and a file will do");
        safetensors_close_model(&m);
    }
}

// ------------------------------------------------------------------------------------------------------- known answers

// checksum_wide as its comment says it, one lane after the other.
static uint64_t wide_by_lanes(const uint8_t *p, size_t bytes) {
    uint8_t last[64 + 64 + 8];
    size_t whole = bytes / 64, rest = bytes % 64;
    for (uint64_t lane = 0, word; lane < 8; lane++) {
        uint64_t k0 = 0x6375726961 ^ lane, k1 = 0x632e73686172647 ^ lane;
        uint64_t v0 = k0 ^ 0x736f6d6570736575u, v1 = k1 ^ 0x646f72616e646f6du;
        uint64_t v2 = k0 ^ 0x6c7967656e657261u, v3 = k1 ^ 0x7465646279746573u;
        for (size_t i = 0; i < whole; i++) {
            memcpy(&word, p + 64 * i + 8 * lane, 8);
            v3 ^= word;
            for (int round = 0; round < 2; round++) SIP_ROUND;
            v0 ^= word;
        }
        v2 ^= 0xff;
        for (int round = 0; round < 4; round++) SIP_ROUND;
        word = v0 ^ v1 ^ v2 ^ v3;
        memcpy(last + 8 * lane, &word, 8);
    }
    memcpy(last + 64, p + 64 * whole, rest);
    memcpy(last + 64 + rest, &(uint64_t){bytes}, 8);
    return checksum(last, 64 + rest + 8);
}

static void test_known_answers(void) {
    // Aumasson and Bernstein, appendix A, and the table of their reference code.
    SipKey key = {0x0706050403020100u, 0x0f0e0d0c0b0a0908u};
    uint8_t input[64];
    for (int i = 0; i < 64; i++) input[i] = (uint8_t)i;
    static const struct { size_t bytes; uint64_t hash; } sip[] = {
        {0, 0x726fdb47dd0e0e31}, {1, 0x74f839c593dc67fd}, {7, 0xab0200f58b01d137}, {8, 0x93f5f5799a932462},
        {15, 0xa129ca6149be45e5}, {63, 0x958a324ceb064572}};
    for (size_t i = 0; i < sizeof sip / sizeof *sip; i++)
        check(siphash(key, input, sip[i].bytes) == sip[i].hash, "siphash of %zu bytes: %016llx", sip[i].bytes,
              (unsigned long long)siphash(key, input, sip[i].bytes));
    uint8_t slice[1000];
    for (int i = 0; i < 1000; i++) slice[i] = (uint8_t)(i * i + 3 * i);
    for (size_t n = 0; n <= 1000; n += n < 130 ? 1 : 67)
        check(checksum_wide(slice, n) == wide_by_lanes(slice, n), "checksum_wide of %zu bytes", n);
    // Salmon et al., Random123's kat_vectors for philox4x32-10.
    static const struct { uint32_t key[2]; Philox counter, expected; } kat[] = {
        {{0, 0}, {{0, 0, 0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{0xffffffff, 0xffffffff}, {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{0xa4093822, 0x299f31d0}, {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
    for (size_t i = 0; i < sizeof kat / sizeof *kat; i++) {
        Philox got = philox(kat[i].key[0], kat[i].key[1], kat[i].counter);
        check(!memcmp(&got, &kat[i].expected, sizeof got), "philox vector %zu: %08x %08x %08x %08x", i, got.word[0], got.word[1],
              got.word[2], got.word[3]);
    }
}

int main(int argc, char **argv) {
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/test_formats.%d", tmp ? tmp : "/tmp", (int)getpid());
    if (mkdir(folder, 0700)) fail(STATUS_FAILED, "%s: cannot make the folder: %s", folder, strerror(errno));
    test_known_answers();
    test_json();
    test_file();
    test_headers();
    test_types();
    test_values();
    test_damage();
    test_writer_and_models();
    if (argc > 1 && !strcmp(argv[1], "--keep")) printf("files kept in %s\n", folder);
    else file_remove_tree(folder);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
