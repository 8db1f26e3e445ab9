/*
JSON (RFC 8259) read into a tree and strings written. As strict as the readers of safetensors headers must be.

  Json, JSON_*         a value
  json_parse           a text as a tree, or NULL and why
  json_read            a file as a tree, or fail
  json_get             a member of an object by key, or NULL
  json_integer         a number that is an integer, exact in 64 bits
  json_free            a tree
  json_write_string    a string in quotes, escaped
  utf8_length          bytes of the character at a place, 0 where it is not UTF-8
  one_line             control characters of a message replaced

Refused: invalid UTF-8, a key twice in one object, anything after the value, lone surrogates, a NUL in a string (\u0000; C
strings end there), numbers beyond a double, more than JSON_DEPTH levels, 2 GiB or more.
*/
#ifndef CURIA_JSON_H
#define CURIA_JSON_H

#include <math.h>
#include <stddef.h>
#include "file.h"

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;
enum { JSON_DEPTH = 64 };               // levels of arrays and objects; also bounds the recursion

typedef struct Json {
    JsonType type;
    int count;                          // ARRAY, OBJECT: children
    struct Json *children;              // [count] in the order of the text
    char **keys;                        // OBJECT: [count], unescaped
    char *text;                         // STRING: unescaped UTF-8; NUMBER: as written; else NULL
    double number;                      // NUMBER
} Json;

// Parsed in place in a copy of the text that stands behind the root: strings are unescaped where they are.
typedef struct { char *text; size_t at, bytes; char *error; size_t error_size; } JsonParser;

// A message that quotes a file's own words stays one line, and a terminal does not obey it.
static inline void one_line(char *message) {
    for (unsigned char *c = (unsigned char *)message; *c; c++) if (*c < 0x20 || *c == 0x7f) *c = '?';
}

static inline int utf8_length(const char *text, size_t left) {
    const uint8_t *s = (const uint8_t *)text;
    if (s[0] < 0x80) return 1;
    int n = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : 2;
    if (s[0] < 0xC2 || s[0] > 0xF4 || (size_t)n > left) return 0;
    for (int i = 1; i < n; i++) if ((s[i] & 0xC0) != 0x80) return 0;
    int overlong = (s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xF0 && s[1] < 0x90);
    int surrogate = s[0] == 0xED && s[1] > 0x9F, beyond = s[0] == 0xF4 && s[1] > 0x8F;
    return overlong || surrogate || beyond ? 0 : n;
}

static inline int json_error(JsonParser *p, const char *what) {
    snprintf(p->error, p->error_size, "byte %zu: %s", p->at, what);
    return 0;
}

static inline void json_skip_space(JsonParser *p) {
    while (p->text[p->at] == ' ' || p->text[p->at] == '\n' || p->text[p->at] == '\t' || p->text[p->at] == '\r') p->at++;
}

// The value of four hexadecimal digits after "\u" at s, or -1.
static inline int json_escaped_unit(const char *s) {
    if (s[0] != '\\' || s[1] != 'u') return -1;
    int unit = 0;
    for (int i = 2; i < 6; i++) {
        int c = s[i], digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
        if (digit < 0) return -1;
        unit = unit << 4 | digit;
    }
    return unit;
}

// From the opening quote to after the closing one. An escape is never shorter than what it stands for.
static inline int json_parse_string(JsonParser *p, char **out) {
    char *to = *out = p->text + ++p->at;
    for (unsigned char c; (c = (unsigned char)p->text[p->at]) != '"';) {
        if (c < 0x20) return json_error(p, p->at == p->bytes ? "the text ends within a string" : "a control character in a string");
        if (c != '\\') {
            *to++ = (char)c;
            p->at++;
            continue;
        }
        static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        const char *letter = p->text[p->at + 1] ? strchr(letters, p->text[p->at + 1]) : NULL;
        if (letter) {
            *to++ = meanings[letter - letters];
            p->at += 2;
            continue;
        }
        int code = json_escaped_unit(p->text + p->at), low = -1;
        if (code <= 0) return json_error(p, code ? "an escape that JSON does not have" : "\\u0000 in a string");
        if (code >= 0xD800 && code < 0xE000) {
            if (code < 0xDC00) low = json_escaped_unit(p->text + p->at + 6);
            if (low < 0xDC00 || low > 0xDFFF) return json_error(p, "half of a surrogate pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            p->at += 6;
        }
        p->at += 6;
        if (code >= 0x10000) *to++ = (char)(0xF0 | code >> 18);
        if (code >= 0x800) *to++ = (char)(code >= 0x10000 ? 0x80 | (code >> 12 & 0x3F) : 0xE0 | code >> 12);
        if (code >= 0x80) *to++ = (char)(code >= 0x800 ? 0x80 | (code >> 6 & 0x3F) : 0xC0 | code >> 6);
        *to++ = (char)(code >= 0x80 ? 0x80 | (code & 0x3F) : code);
    }
    *to = 0;
    p->at++;
    return 1;
}

static inline int json_skip_digits(JsonParser *p) {
    size_t from = p->at;
    while (p->text[p->at] >= '0' && p->text[p->at] <= '9') p->at++;
    return p->at > from;
}

static inline int json_parse_number(JsonParser *p, Json *node) {
    size_t from = p->at;
    if (p->text[p->at] == '-') p->at++;
    if (p->text[p->at] == '0') p->at++;
    else if (!json_skip_digits(p))
        return json_error(p, p->at == p->bytes ? "the text ends where a value should be" : "not a value");
    if (p->text[p->at] == '.') {
        p->at++;
        if (!json_skip_digits(p)) return json_error(p, "a number with no digit after its point");
    }
    if (p->text[p->at] == 'e' || p->text[p->at] == 'E') {
        p->at++;
        if (p->text[p->at] == '+' || p->text[p->at] == '-') p->at++;
        if (!json_skip_digits(p)) return json_error(p, "a number with no digit in its exponent");
    }
    // Moved over the character before it, which is done with, so that its 0 overwrites nothing that is still to be read.
    node->type = JSON_NUMBER;
    node->text = (char *)memmove(p->text + from - 1, p->text + from, p->at - from);
    p->text[p->at - 1] = 0;
    node->number = strtod(node->text, NULL);
    return isfinite(node->number) ? 1 : json_error(p, "a number too large for a double");
}

static inline int json_compare_keys(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static inline int json_check_keys(JsonParser *p, const Json *node) {
    char **sorted = (char **)malloc((size_t)node->count * sizeof *sorted);
    if (!sorted) return json_error(p, "out of memory");
    memcpy(sorted, node->keys, (size_t)node->count * sizeof *sorted);
    qsort(sorted, (size_t)node->count, sizeof *sorted, json_compare_keys);
    const char *twice = NULL;
    for (int i = 1; i < node->count; i++) if (!strcmp(sorted[i - 1], sorted[i])) twice = sorted[i];
    if (twice) snprintf(p->error, p->error_size, "byte %zu: the object that ends here has the key '%.200s' twice", p->at, twice);
    free(sorted);
    return !twice;
}

// Room for one more child; arrays have room for a power of two.
static inline int json_grow(Json *node) {
    if (node->count & (node->count - 1)) return 1;
    size_t room = node->count ? 2 * (size_t)node->count : 1;
    Json *children = (Json *)realloc(node->children, room * sizeof *children);
    if (!children) return 0;
    node->children = children;
    if (node->type == JSON_ARRAY) return 1;
    char **keys = (char **)realloc(node->keys, room * sizeof *keys);
    if (!keys) return 0;
    node->keys = keys;
    return 1;
}

static inline int json_parse_value(JsonParser *p, Json *node, int depth) {
    json_skip_space(p);
    char open = p->text[p->at];
    if (open == '"') {
        node->type = JSON_STRING;
        return json_parse_string(p, &node->text);
    }
    if (open != '{' && open != '[') {
        static const char *const words[] = {"null", "false", "true"};
        for (int i = 0; i < 3; i++) {
            if (strncmp(p->text + p->at, words[i], strlen(words[i]))) continue;
            node->type = (JsonType)(JSON_NULL + i);
            p->at += strlen(words[i]);
            return 1;
        }
        return json_parse_number(p, node);
    }
    if (depth == JSON_DEPTH) return json_error(p, "more than 64 levels of arrays and objects");
    int object = open == '{';
    char close = object ? '}' : ']';
    node->type = object ? JSON_OBJECT : JSON_ARRAY;
    p->at++;
    json_skip_space(p);
    if (p->text[p->at] == close) {
        p->at++;
        return 1;
    }
    for (;;) {
        if (!json_grow(node)) return json_error(p, "out of memory");
        if (object) {
            json_skip_space(p);
            if (p->text[p->at] != '"') return json_error(p, "expected a key in quotes");
            if (!json_parse_string(p, &node->keys[node->count])) return 0;
            json_skip_space(p);
            if (p->text[p->at] != ':') return json_error(p, "expected ':' after a key");
            p->at++;
        }
        Json *child = &node->children[node->count++];
        memset(child, 0, sizeof *child);
        if (!json_parse_value(p, child, depth + 1)) return 0;
        json_skip_space(p);
        char c = p->text[p->at];
        if (c != ',' && c != close) return json_error(p, object ? "expected ',' or '}'" : "expected ',' or ']'");
        p->at++;
        if (c == close) return object ? json_check_keys(p, node) : 1;
    }
}

static inline void json_free_children(Json *node) {
    for (int i = 0; i < node->count; i++) json_free_children(&node->children[i]);
    free(node->children);
    free(node->keys);
}

// NULL does nothing. Only for what json_parse and json_read returned: children live and die with their root.
static inline void json_free(Json *root) {
    if (root) json_free_children(root);
    free(root);
}

// text: [bytes], any content; need not end with 0. On an error NULL, and in error "byte N: what is wrong there", N from 0.
static inline Json *json_parse(const char *text, size_t bytes, char *error, size_t error_size) {
    JsonParser p = {NULL, 0, bytes, error, error_size};
    Json *root = bytes < 0x7fffffff ? (Json *)malloc(sizeof *root + 1 + bytes + 1) : NULL;
    if (!root) {
        json_error(&p, bytes < 0x7fffffff ? "out of memory" : "2 GiB of JSON or more");
        return NULL;
    }
    memset(root, 0, sizeof *root);
    p.text = (char *)(root + 1) + 1;    // the byte before is for a number at the very start
    memcpy(p.text, text, bytes);
    p.text[bytes] = 0;                  // ends every loop of the parser: no rule accepts a 0
    int good = 1, length = 1;
    for (; good && p.at < bytes; p.at += (size_t)length) {
        length = utf8_length(p.text + p.at, bytes - p.at);
        if (!length) good = json_error(&p, "not UTF-8");
    }
    if (good) {
        p.at = 0;
        good = json_parse_value(&p, root, 0);
        if (good) json_skip_space(&p);
        if (good && p.at != bytes) good = json_error(&p, "more text after the value");
    }
    if (good) return root;
    one_line(error);
    json_free(root);
    return NULL;
}

// Ends the program with STATUS_DATA where the file cannot be read or is not JSON.
static inline Json *json_read(const char *path) {
    char error[512];
    size_t bytes;
    char *text = file_read(path, &bytes);
    Json *root = json_parse(text, bytes, error, sizeof error);
    if (!root) fail(STATUS_DATA, "%s: is not JSON: %s", path, error);
    free(text);
    return root;
}

// Linear in the number of keys. NULL where node is NULL or no object, so that calls can be nested.
static inline const Json *json_get(const Json *node, const char *key) {
    if (!node || node->type != JSON_OBJECT) return NULL;
    for (int i = 0; i < node->count; i++) if (!strcmp(node->keys[i], key)) return &node->children[i];
    return NULL;
}

// 1 and *out where node is a number written without point or exponent that fits 64 bits; else 0. node may be NULL.
static inline int json_integer(const Json *node, int64_t *out) {
    if (!node || node->type != JSON_NUMBER || strpbrk(node->text, ".eE")) return 0;
    errno = 0;
    long long value = strtoll(node->text, NULL, 10);
    if (errno) return 0;
    *out = value;
    return 1;
}

// Bytes that are not UTF-8 (a path, say) become U+FFFD, so that the file can be read again. Errors stay in ferror(f).
static inline void json_write_string(FILE *f, const char *s) {
    fputc('"', f);
    for (size_t left = strlen(s); left;) {
        unsigned char c = (unsigned char)*s;
        int n = utf8_length(s, left);
        if (n == 0) fputs("\\ufffd", f);
        else if (c == '"' || c == '\\') fprintf(f, "\\%c", c);
        else if (c == '\n') fputs("\\n", f);
        else if (c == '\t') fputs("\\t", f);
        else if (c < 0x20 || c == 0x7f) fprintf(f, "\\u%04x", c);
        else fwrite(s, 1, (size_t)n, f);
        s += n ? n : 1;
        left -= (size_t)(n ? n : 1);
    }
    fputc('"', f);
}

#endif
