/*
CUDA source to C++ for the emulator: convert in.cu > out.cc

  kernel<<<grid, block, bytes, stream>>>(args)    becomes a call of emu::launch
  extern __shared__ char shared[];                becomes a pointer to the block's dynamic shared memory
  __shared__ T name[N];                           becomes a reference into the block's shared memory
  #pragma unroll, static __global__               lose what g++ does not know or emu.h says itself

Comments, strings and preprocessor lines pass through; line numbers stay, and #line names the source.
*/
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
using std::string;

static string text, path, out;

[[noreturn]] static void fail(size_t at, const char *what) {
    int line = 1;
    for (size_t i = 0; i < at && i < text.size(); i++) line += text[i] == '\n';
    fprintf(stderr, "error: %s:%d: %s\n", path.c_str(), line, what);
    exit(1);
}

static bool word_char(char c) { return isalnum((unsigned char)c) || c == '_'; }
static bool starts(size_t at, const char *word) { return text.compare(at, strlen(word), word) == 0; }
static bool starts_word(size_t at, const char *word) {
    return starts(at, word) && !word_char(text[at + strlen(word)]) && (at == 0 || !word_char(text[at - 1]));
}

// The end of a comment, string or character literal that begins at `at`, or `at` where none does.
static size_t skip(size_t at) {
    size_t end;
    if (starts(at, "//")) return (end = text.find('\n', at)) == string::npos ? text.size() : end;
    if (starts(at, "/*")) return (end = text.find("*/", at + 2)) == string::npos ? text.size() : end + 2;
    if (text[at] == '\'' && at && isalnum((unsigned char)text[at - 1])) return at + 1;      // 1'000
    if (text[at] != '"' && text[at] != '\'') return at;
    for (end = at + 1; end < text.size() && text[end] != text[at]; end++) end += text[end] == '\\';
    return end + 1;
}

// The first of `stop` at bracket depth 0 from `at` on.
static size_t find_stop(size_t at, const char *stop) {
    for (int depth = 0; at < text.size();) {
        size_t next = skip(at);
        if (next != at) { at = next; continue; }
        if (depth == 0 && starts(at, stop)) return at;
        depth += strchr("([{", text[at]) != NULL;
        depth -= strchr(")]}", text[at]) != NULL;
        at++;
    }
    fail(at, "a launch or a __shared__ declaration does not end");
}

// The kernel's name, with its template arguments, at the end of what has been written; taken off it.
static string take_name() {
    size_t end = out.size();
    while (end && isspace((unsigned char)out[end - 1])) end--;
    size_t from = end;
    if (from && out[from - 1] == '>') {
        int depth = 0;
        do {
            from--;
            depth += out[from] == '>';
            depth -= out[from] == '<';
        } while (from && depth);
    }
    while (from && (word_char(out[from - 1]) || out[from - 1] == ':')) from--;
    string name = out.substr(from, end - from);
    out.erase(from);
    return name;
}

static string replaced(string s, const string &from, const string &to) {
    for (size_t at = 0; (at = s.find(from, at)) != string::npos;) {
        bool whole = (at == 0 || !word_char(s[at - 1])) && (at + from.size() == s.size() || !word_char(s[at + from.size()]));
        if (whole) s.replace(at, from.size(), to), at += to.size();
        else at += from.size();
    }
    return s;
}

static size_t launch(size_t at) {
    string name = take_name();
    if (name.empty()) fail(at, "<<< without a kernel's name before it");
    size_t close = find_stop(at + 3, ">>>"), open = close + 3;
    while (isspace((unsigned char)text[open])) open++;
    if (text[open] != '(') fail(at, "a launch without arguments");
    size_t end = find_stop(open + 1, ")");
    string shape = text.substr(at + 3, close - at - 3), args = text.substr(open + 1, end - open - 1), gap;
    for (size_t i = close + 3; i < open; i++) if (text[i] == '\n') gap += '\n';
    bool empty = args.find_first_not_of(" \t\n\\") == string::npos;
    out += "emu::launch(emu::Shape(" + shape + "), \"" + name + "\", [](auto t_) -> decltype(emu::address(t_, " + name +
           ")) { return emu::address(t_, " + name + "); }, [](auto &...p_) { " + name + "(p_...); }" + gap +
           (empty ? "" : ", ") + replaced(args, "NULL", "nullptr") + ")";
    return end + 1;
}

// The names that a declaration declares: the last word before each [ or end, at depth 0.
static std::vector<string> declared(const string &d) {
    std::vector<string> names;
    string last;
    int depth = 0, done = 0;
    for (size_t i = 0; i <= d.size(); i++) {
        char c = i < d.size() ? d[i] : ',';
        if (depth == 0 && (c == '[' || c == ',')) {
            if (!done) names.push_back(last);
            done = c == '[';
        }
        if (depth == 0 && word_char(c)) last = i && word_char(d[i - 1]) ? last + c : string(1, c);
        depth += strchr("([{<", c) != NULL;
        depth -= strchr(")]}>", c) != NULL;
    }
    return names;
}

static int shared_count;

static size_t shared(size_t at, bool dynamic) {
    size_t from = at + strlen("__shared__"), end = find_stop(from, ";");
    string d = text.substr(from, end - from);
    std::vector<string> names = declared(d);
    if (dynamic) {
        while (out.back() != 'n' || out.compare(out.size() - 6, 6, "extern")) out.pop_back();
        out.erase(out.size() - 6);
        string type = d.substr(0, d.rfind(names[0]));
        out += type + "*" + names[0] + " = (" + type + "*)emu::dynamic_shared()";
        return end;
    }
    string id = std::to_string(shared_count++);
    out += "struct emu_shared_" + id + " {" + d + "; }; static emu::Slot emu_slot_" + id + ";";
    for (const string &name : names)
        out += " auto &" + name + " = emu::shared<emu_shared_" + id + ">(emu_slot_" + id + ")." + name + ";";
    out.pop_back();
    return end;
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: convert in.cu > out.cc\n"), 2;
    path = argv[1];
    FILE *f = fopen(argv[1], "rb");
    if (!f) return fprintf(stderr, "error: %s: cannot be opened\n", argv[1]), 1;
    for (int c; (c = getc(f)) != EOF;) text += (char)c;
    fclose(f);
    out = "#line 1 \"" + path + "\"\n";
    bool line_start = true;
    for (size_t at = 0; at < text.size();) {
        size_t next = skip(at);
        if (next == at && line_start && text[at] == '#') {      // a preprocessor line, with its continuations
            for (next = at; next < text.size() && text[next] != '\n'; next++) next += text[next] == '\\';
            size_t word = text.find_first_not_of(" \t", at + 1);
            size_t pragma = starts(word, "pragma") ? text.find_first_not_of(" \t", word + 6) : string::npos;
            if (pragma != string::npos && starts(pragma, "unroll")) at = next;
        }
        if (next != at) {
            out.append(text, at, next - at);
            at = next;
            continue;
        }
        if (starts(at, "<<<")) at = launch(at);
        else if (starts_word(at, "__shared__")) {
            size_t last = out.find_last_not_of(" \t\n");
            bool dynamic = last != string::npos && last >= 5 && !out.compare(last - 5, 6, "extern");
            at = shared(at, dynamic);
        } else if (starts_word(at, "static") && starts_word(text.find_first_not_of(" \t\n", at + 6), "__global__")) at += 7;
        else {
            if (!isspace((unsigned char)text[at])) line_start = false;
            if (text[at] == '\n') line_start = true;
            out += text[at++];
        }
    }
    fwrite(out.data(), 1, out.size(), stdout);
    return 0;
}
