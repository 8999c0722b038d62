# Programs whose right results are known; runs inside a Debian that has them. Each part that went well says so.
set -e
cd /tmp

# A hundred and fifty functions do the same however they are compiled.
python3 - > big.c <<'PYTHON'
print("#include <stdio.h>\n#include <stdint.h>\n#include <string.h>")
for i in range(150):
    print(f"""static uint64_t f{i}(uint64_t a, uint64_t b) {{
    uint64_t s = b ^ {i * 2654435761};
    double d = a % 1000;
    char t[32];
    for (int j = 0; j < {i % 7 + 3}; j++) {{
        s = s * {2 * i + 3} + (a >> (j & 31));
        s ^= s >> {i % 13 + 1};
        d = d * 1.0{i} + j;
        switch (s % {i % 5 + 3}) {{
        case 0: s += b / {i + 1}; break;
        case 1: s -= a % {i + 7}; break;
        case 2: s = (s << {i % 17 + 1}) | (s >> {63 - i % 17}); break;
        default: s += (uint64_t)d;
        }}
    }}
    snprintf(t, sizeof t, "%.3f", d);
    return s + strlen(t) * {i};
}}""")
print("int main() { uint64_t a = 1, b = 2; for (int n = 0; n < 300; n++) {")
for i in range(150):
    print(f"a = f{i}(a, b) + n; b ^= a >> 7;")
print('} printf("%llx %llx\\n", (unsigned long long)a, (unsigned long long)b); }')
PYTHON
for level in -O0 -O2 "-O3 -mavx2"; do
    gcc $level -o big big.c
    ./big
done | sort -u > results
test "$(wc -l < results)" = 1
echo gcc-good "$(cat results)"

# What it measures it checks as well; then answers of FIPS 180-4 and FIPS 197, and signatures of which one is of another file.
openssl speed -seconds 1 sha256 rsa2048 ecdsap256 > speed.log 2>&1
openssl speed -seconds 1 -evp aes-128-gcm >> speed.log 2>&1
if grep -v "^compiler:" speed.log | grep -i -E "error|fail"; then exit 1; fi
test "$(printf abc | openssl sha256 -r | cut -c1-16)" = ba7816bf8f01cfea
printf '\000\021\042\063\104\125\146\167\210\231\252\273\314\335\356\377' > plain
openssl enc -aes-128-ecb -K 000102030405060708090a0b0c0d0e0f -nopad -in plain -out packed
test "$(od -An -tx1 packed | tr -d ' \n')" = 69c4e0d86a7b0430d8cdb78070b4c55a
for kind in "RSA -pkeyopt rsa_keygen_bits:2048" "EC -pkeyopt ec_paramgen_curve:P-256" ED25519; do
    openssl genpkey -algorithm $kind -out key 2> keys.log
    openssl pkey -in key -pubout -out public
    openssl pkeyutl -sign -inkey key -rawin -in big.c -out signature
    openssl pkeyutl -verify -pubin -inkey public -rawin -in big.c -sigfile signature > verified
    if openssl pkeyutl -verify -pubin -inkey public -rawin -in plain -sigfile signature > verified 2>&1; then exit 1; fi
done
echo openssl-good

python3 -m test test_int test_long test_float test_math test_decimal test_struct test_bytes test_json test_re test_hashlib \
    test_zlib test_pickle test_threading > python.log 2>&1 || { tail -n 30 python.log; exit 1; }
echo python-good

stress-ng --verify --timeout 60 --cpu "$(nproc)" --vm "$(nproc)" --vm-bytes 64M --matrix "$(nproc)" --fork "$(nproc)" --pipe "$(nproc)" \
    > stress.log 2>&1 || { tail -n 30 stress.log; exit 1; }
grep -q "successful run completed" stress.log
echo stress-good
