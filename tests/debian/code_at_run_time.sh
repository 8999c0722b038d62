# Compilers that make code while it runs, with answers that are known; runs inside a Debian that has them. Each part that went well says so.
# All count the primes below two million (148,933) and the ways to place nine queens (352), and sum f(i) of 400 functions f(x) = i * x that are
# made one after the other (400 * 401 * 801 / 6 = 21,413,400).
set -e
cd /tmp

cat > work.lua <<'LUA'
local composite, primes = {}, 0
for i = 2, 1999999 do
    if not composite[i] then
        primes = primes + 1
        for j = i * i, 1999999, i do composite[j] = true end
    end
end
local columns, rising, falling = {}, {}, {}
local function place(row)
    if row == 10 then return 1 end
    local ways = 0
    for column = 1, 9 do
        if not (columns[column] or rising[row + column] or falling[row - column]) then
            columns[column], rising[row + column], falling[row - column] = true, true, true
            ways = ways + place(row + 1)
            columns[column], rising[row + column], falling[row - column] = nil, nil, nil
        end
    end
    return ways
end
local sum = 0
for i = 1, 400 do
    local f = loadstring("local x = ... local s = 0 for j = 1, " .. i .. " do s = s + x end return s")
    sum = sum + f(i)
end
-- A C function calls back into Lua: the host's qsort by a made comparison.
local ffi = require("ffi")
ffi.cdef("void qsort(void *, size_t, size_t, int (*)(const int *, const int *));")
local numbers = ffi.new("int[2003]")
for i = 0, 2002 do numbers[i] = i * 7919 % 2003 end
ffi.C.qsort(numbers, 2003, 4, function(a, b) return a[0] - b[0] end)
for i = 0, 2002 do assert(numbers[i] == i) end
print(primes, place(1), sum)
LUA
for options in -O3 -Ohotloop=2 -joff; do
    test "$(luajit $options work.lua)" = "$(printf '148933\t352\t21413400')"
done
echo luajit-good

cat > work.js <<'JS'
const N = 2000000, composite = new Uint8Array(N);
let primes = 0;
for (let i = 2; i < N; i++) {
    if (composite[i]) continue;
    primes++;
    for (let j = i * i; j < N; j += i) composite[j] = 1;
}
const columns = new Set(), rising = new Set(), falling = new Set();
function place(row) {
    if (row == 9) return 1;
    let ways = 0;
    for (let column = 0; column < 9; column++) {
        if (columns.has(column) || rising.has(row + column) || falling.has(row - column)) continue;
        columns.add(column), rising.add(row + column), falling.add(row - column);
        ways += place(row + 1);
        columns.delete(column), rising.delete(row + column), falling.delete(row - column);
    }
    return ways;
}
let sum = 0;
for (let i = 1; i <= 400; i++) sum += new Function("x", `let s = 0; for (let j = 0; j < ${i}; j++) s += x; return s`)(i);
// Numbers, then text, then numbers too large for a machine word, through code that was made for the first of these.
const add = (a, b) => a + b;
let small = 0;
for (let i = 0; i < 200000; i++) small = add(small, i);
if (small != 19999900000 || add("a", 1) != "a1" || add(2n ** 70n, 1n) != 1180591620717411303425n) throw "add";
// SHA-256 of a million times "a" (FIPS 180), in code of our own.
function sha256(bytes) {
    const root = (x, n) => Math.floor((x ** (1 / n) % 1) * 2 ** 32) | 0, prime = [];
    for (let i = 2; prime.length < 64; i++) if (prime.every(p => i % p)) prime.push(i);
    const k = prime.map(p => root(p, 3)), h = prime.slice(0, 8).map(p => root(p, 2));
    const padded = new Uint8Array(Math.ceil((bytes.length + 9) / 64) * 64), w = new Int32Array(64);
    padded.set(bytes), padded[bytes.length] = 128;
    new DataView(padded.buffer).setUint32(padded.length - 4, bytes.length * 8);
    const turn = (x, n) => x >>> n | x << 32 - n, view = new DataView(padded.buffer);
    for (let at = 0; at < padded.length; at += 64) {
        let [a, b, c, d, e, f, g, z] = h;
        for (let i = 0; i < 64; i++) {
            w[i] = i < 16 ? view.getInt32(at + 4 * i)
                : w[i - 16] + w[i - 7] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >>> 3)
                + (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >>> 10);
            const t = z + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + (e & f ^ ~e & g) + k[i] + w[i] | 0;
            [z, g, f, e, d, c, b, a] = [g, f, e, d + t | 0, c, b, a, t + (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + (a & b ^ a & c ^ b & c) | 0];
        }
        [a, b, c, d, e, f, g, z].forEach((x, i) => h[i] = h[i] + x | 0);
    }
    return h.map(x => (x >>> 0).toString(16).padStart(8, "0")).join("");
}
const digest = sha256(new Uint8Array(1000000).fill(97));
if (digest != "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0") throw digest;
// WebAssembly: (func (param $n i32) (result i32) ...) sums i * i for i < n.
if (typeof WebAssembly != "undefined") {
    const body = [1, 2, 127, 3, 64, 32, 2, 32, 1, 32, 1, 108, 106, 33, 2, 32, 1, 65, 1, 106, 34, 1, 32, 0, 72, 13, 0, 11, 32, 2, 11];
    const bytes = [0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0, 10, body.length + 2, 1, body.length];
    const { f } = new WebAssembly.Instance(new WebAssembly.Module(new Uint8Array([...bytes, ...body]))).exports;
    for (let i = 0; i < 2000; i++) if (f(1000) != 332833500) throw "wasm";
}
console.log(primes, place(0), sum);
JS
for options in --opt "--always-sparkplug --interrupt-budget=1000" --jitless; do
    test "$(node $options work.js 2> node.log)" = "148933 352 21413400"
done
echo node-good

cat > work.php <<'PHP'
<?php
function primes($n) {
    $composite = array_fill(0, $n, false);
    $primes = 0;
    for ($i = 2; $i < $n; $i++) {
        if ($composite[$i]) continue;
        $primes++;
        for ($j = $i * $i; $j < $n; $j += $i) $composite[$j] = true;
    }
    return $primes;
}
function place($row, $columns, $rising, $falling) {
    if ($row == 9) return 1;
    $ways = 0;
    for ($column = 0; $column < 9; $column++) {
        [$c, $r, $f] = [1 << $column, 1 << $row + $column, 1 << $row - $column + 8];
        if ($columns & $c || $rising & $r || $falling & $f) continue;
        $ways += place($row + 1, $columns | $c, $rising | $r, $falling | $f);
    }
    return $ways;
}
$sum = 0;
for ($i = 1; $i <= 400; $i++) {
    $f = eval("return function (\$x) { \$s = 0; for (\$j = 0; \$j < $i; \$j++) \$s += \$x; return \$s; };");
    $sum += $f($i);
}
// Each number of four digits that begins and ends with the same one.
if (preg_match_all('/\b(\d)\d\d\1\b/', implode(' ', range(0, 20000))) != 900) exit(1);
echo primes(2000000), ' ', place(0, 0, 0, 0), ' ', $sum, "\n";
PHP
for jit in tracing function off; do
    test "$(php -d memory_limit=512M -d opcache.enable_cli=1 -d opcache.jit_buffer_size=32M -d opcache.jit=$jit work.php)" = "148933 352 21413400"
done
echo php-good

cat > work.lisp <<'LISP'
(defun primes (n)
  (let ((composite (make-array n :element-type 'bit :initial-element 0)))
    (loop for i from 2 below n when (zerop (aref composite i))
          count t and do (loop for j from (* i i) below n by i do (setf (aref composite j) 1)))))
(defun place (row columns rising falling)
  (if (= row 9) 1
      (loop for column below 9
            for c = (ash 1 column) for r = (ash 1 (+ row column)) for f = (ash 1 (+ 8 (- row column)))
            unless (or (logtest columns c) (logtest rising r) (logtest falling f))
              sum (place (1+ row) (logior columns c) (logior rising r) (logior falling f)))))
(format t "~a ~a ~a~%" (primes 2000000) (place 0 0 0 0)
        (loop for i from 1 to 400 sum (funcall (compile nil `(lambda (x) (declare (fixnum x)) (* x ,i))) i)))
LISP
test "$(sbcl --script work.lisp)" = "148933 352 21413400"
echo sbcl-good

cat > Work.java <<'JAVA'
import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

public class Work {
    static int primes(int n) {
        boolean[] composite = new boolean[n];
        int primes = 0;
        for (int i = 2; i < n; i++) {
            if (composite[i]) continue;
            primes++;
            for (long j = (long) i * i; j < n; j += i) composite[(int) j] = true;
        }
        return primes;
    }

    static int place(int row, int columns, int rising, int falling) {
        if (row == 9) return 1;
        int ways = 0;
        for (int column = 0; column < 9; column++) {
            int c = 1 << column, r = 1 << row + column, f = 1 << row - column + 8;
            if ((columns & c | rising & r | falling & f) == 0) ways += place(row + 1, columns | c, rising | r, falling | f);
        }
        return ways;
    }

    static int length(String text) {
        try {
            return text.length();
        } catch (NullPointerException e) {
            return -1;
        }
    }

    public static void main(String[] arguments) throws Exception {
        // A null among many others: the compiled code has no test for it, the fault is its test.
        int lengths = 0;
        for (int i = 0; i < 200000; i++) lengths += length(i % 1000 == 999 ? null : "abc");
        if (lengths != 3 * 199800 - 200) throw new Error("lengths");
        var digest = java.security.MessageDigest.getInstance("SHA-256");
        for (int i = 0; i < 1000; i++) digest.update("a".repeat(1000).getBytes());
        String hex = HexFormat.of().formatHex(digest.digest());
        if (!hex.equals("cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")) throw new Error(hex);
        if (IntStream.range(0, 1000000).parallel().mapToLong(i -> (long) i * i).sum() != 333332833333500000L) throw new Error("sum");
        var counts = new ConcurrentHashMap<Integer, Integer>();
        var threads = Executors.newFixedThreadPool(4);
        var tasks = new ArrayList<Callable<Object>>();
        for (int t = 0; t < 8; t++) tasks.add(() -> { for (int i = 0; i < 20000; i++) counts.merge(i % 97, 1, Integer::sum); return null; });
        for (var task : threads.invokeAll(tasks)) task.get();
        threads.shutdown();
        if (counts.values().stream().mapToInt(i -> i).sum() != 160000) throw new Error("counts");
        long sum = 0;
        for (int i = 1; i <= 400; i++) {
            int factor = i;
            IntUnaryOperator f = x -> x * factor;
            sum += f.applyAsInt(i);
        }
        System.out.println(primes(2000000) + " " + place(0, 0, 0, 0) + " " + sum);
    }

    interface IntUnaryOperator { int applyAsInt(int x); }
}
JAVA
javac Work.java
for options in -XX:+UseG1GC -XX:TieredStopAtLevel=1 "-XX:-TieredCompilation -XX:+UseZGC" -Xint; do
    test "$(java $options -Xmx256m Work)" = "148933 352 21413400"
done
echo java-good
