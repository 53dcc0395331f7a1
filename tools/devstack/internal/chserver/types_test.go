package chserver_test

import (
	"context"
	"fmt"
	"net"
	"reflect"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/shopspring/decimal"
)

// row has a column of each supported type.
type row struct {
	ID      uint64            `ch:"id"`
	Small   int8              `ch:"small"`
	Signed  int64             `ch:"signed"`
	Real    float64           `ch:"real"`
	Flag    bool              `ch:"flag"`
	Text    string            `ch:"text"`
	Fixed   string            `ch:"fixed"`
	Day     time.Time         `ch:"day"`
	Second  time.Time         `ch:"second"`
	Micro   time.Time         `ch:"micro"`
	UUID    uuid.UUID         `ch:"uuid"`
	Low     string            `ch:"low"`
	Maybe   *string           `ch:"maybe"`
	LowMay  *string           `ch:"low_maybe"`
	Numbers []uint32          `ch:"numbers"`
	Lists   [][]string        `ch:"lists"`
	Map     map[string]uint64 `ch:"map"`
	LowMap  map[string]string `ch:"low_map"`
	Choice  string            `ch:"choice"`
	Price   decimal.Decimal   `ch:"price"`
	Address net.IP            `ch:"address"`
	Pair    map[string]any    `ch:"pair"`
}

const rowColumns = `id UInt64, small Int8, signed Int64, real Float64, flag Bool, text String, fixed FixedString(4),
	day Date, second DateTime('UTC'), micro DateTime64(6, 'UTC'), uuid UUID, low LowCardinality(String),
	maybe Nullable(String), low_maybe LowCardinality(Nullable(String)), numbers Array(UInt32), lists Array(Array(String)),
	map Map(String, UInt64), low_map Map(LowCardinality(String), String), choice Enum8('yes' = 1, 'no' = 2),
	price Decimal(18, 4), address IPv6, pair Tuple(name String, size UInt64)`

func makeRow(i uint64) row {
	at := time.UnixMicro(1_700_000_000_123_456 + int64(i)*997).UTC() //nolint:gosec // small
	r := row{
		ID:      i,
		Small:   int8(i),               //nolint:gosec // wraps on purpose
		Signed:  -int64(i) * 1_000_003, //nolint:gosec // small
		Real:    float64(i) / 3,
		Flag:    i%3 == 0,
		Text:    strings.Repeat("a\x00\n'\"\\ü", int(i%5)),
		Fixed:   fmt.Sprintf("%04d", i%10000),
		Day:     at.Truncate(24 * time.Hour),
		Second:  at.Truncate(time.Second),
		Micro:   at,
		UUID:    uuid.NewSHA1(uuid.NameSpaceOID, fmt.Append(nil, i)),
		Low:     fmt.Sprint("kind-", i%300),
		Numbers: make([]uint32, i%4),
		Lists:   make([][]string, i%3),
		Map:     map[string]uint64{},
		LowMap:  map[string]string{"k": fmt.Sprint(i)},
		Choice:  []string{"yes", "no"}[i%2],
		Price:   decimal.New(int64(i)*7, -4),          //nolint:gosec // small
		Address: net.IPv4(10, 0, byte(i>>8), byte(i)), //nolint:gosec // truncates on purpose
		Pair:    map[string]any{"name": fmt.Sprint(i), "size": i},
	}
	for j := range r.Numbers {
		r.Numbers[j] = uint32(i) + uint32(j) //nolint:gosec // small
	}
	for j := range r.Lists {
		r.Lists[j] = make([]string, j)
		for k := range r.Lists[j] {
			r.Lists[j][k] = fmt.Sprint(i, k)
		}
	}
	for j := range i % 3 {
		r.Map[fmt.Sprint(j)] = i + j
	}
	if i%2 == 0 {
		r.Maybe = &r.Text
		r.LowMay = &r.Low
	}
	return r
}

// canonical makes rows with the same meaning comparable.
func canonical(r row) row {
	r.Day, r.Second, r.Micro = r.Day.UTC(), r.Second.UTC(), r.Micro.UTC()
	r.Price = decimal.New(r.Price.Shift(4).IntPart(), -4)
	r.Address = r.Address.To16()
	return r
}

// roundTrip inserts rows in one batch, reads all of them back and compares them.
func roundTrip(ctx context.Context, o *clickhouse.Options, count uint64) {
	GinkgoHelper()
	conn := open(o)
	table := newName("types")
	Expect(conn.Exec(ctx, "CREATE TABLE "+table+" ("+rowColumns+") ENGINE = MergeTree ORDER BY id")).To(Succeed())

	batch, err := conn.PrepareBatch(ctx, "INSERT INTO "+table)
	Expect(err).NotTo(HaveOccurred())
	for i := range count {
		r := makeRow(i)
		if err := batch.AppendStruct(&r); err != nil {
			Expect(err).NotTo(HaveOccurred())
		}
	}
	Expect(batch.Send()).To(Succeed())

	rows, err := conn.Query(ctx, "SELECT * FROM "+table+" ORDER BY id")
	Expect(err).NotTo(HaveOccurred())
	defer rows.Close()
	var read uint64
	for rows.Next() {
		var got row
		if err := rows.ScanStruct(&got); err != nil {
			Expect(err).NotTo(HaveOccurred())
		}
		// Gomega's matchers are too slow for each row.
		if want := canonical(makeRow(read)); !reflect.DeepEqual(canonical(got), want) {
			Expect(canonical(got)).To(Equal(want))
		}
		read++
	}
	Expect(rows.Err()).NotTo(HaveOccurred())
	Expect(read).To(Equal(count))
	Expect(conn.Exec(ctx, "DROP TABLE "+table)).To(Succeed())
}

var _ = eachProtocol("column types", func(protocol clickhouse.Protocol) {
	It("returns 100,000 rows of every type unchanged", Label("long"), func(ctx context.Context) {
		roundTrip(ctx, options(protocol), 100_000)
	})

	compressions := []clickhouse.CompressionMethod{clickhouse.CompressionNone, clickhouse.CompressionLZ4, clickhouse.CompressionZSTD}
	if protocol == clickhouse.HTTP {
		compressions = append(compressions, clickhouse.CompressionGZIP, clickhouse.CompressionDeflate, clickhouse.CompressionBrotli)
	}
	for _, method := range compressions {
		It("returns rows compressed with "+method.String(), func(ctx context.Context) {
			o := options(protocol)
			o.Compression = &clickhouse.Compression{Method: method, Level: 1}
			o.Settings = clickhouse.Settings{"network_compression_method": "LZ4"}
			if method == clickhouse.CompressionZSTD {
				o.Settings["network_compression_method"] = "ZSTD"
			}
			roundTrip(ctx, o, 3000)
		})
	}
})
