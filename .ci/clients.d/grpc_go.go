// grpc-go, of Debian's golang-google-grpc-dev. How it is called, and what the values are for: scenarios.py.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	pb "ganserve/v1"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	model        = "cdcgan-mnist"
	seed         = 1
	imageBytes   = 28 * 28
	streamCount  = 2000
	endlessCount = 5000000
	limit        = 24 * time.Hour
	openStreams  = 1000
	age          = 5 * time.Second
	quiet        = 12 * time.Second
)

var (
	acceptedMetadata = strings.Repeat("XZ", 6<<10)
	refusedMetadata  = strings.Repeat("XZ", 10<<10)
)

type target struct {
	address, caFile string
	pixels          []byte
}

type client struct {
	pb.GenerationServiceClient
	connection *grpc.ClientConn
}

func connect(to target, options ...grpc.DialOption) (*client, error) {
	security := grpc.WithInsecure()
	if to.caFile != "" {
		certificates, err := credentials.NewClientTLSFromFile(to.caFile, "")
		if err != nil {
			return nil, err
		}
		security = grpc.WithTransportCredentials(certificates)
	}
	connection, err := grpc.Dial(to.address, append(options, security)...)
	if err != nil {
		return nil, err
	}
	return &client{pb.NewGenerationServiceClient(connection), connection}, nil
}

func request(count uint32) *pb.GenerateImagesRequest {
	return &pb.GenerateImagesRequest{Model: model, Count: count, Source: &pb.GenerateImagesRequest_Seed{Seed: seed}}
}

func checkOne(response *pb.GenerateImagesResponse) error {
	if response == nil || len(response.Seeds) != 1 || response.Seeds[0] != seed || len(response.Pixels) != imageBytes {
		return fmt.Errorf("the answer is not the image asked for: %v", response)
	}
	return nil
}

func one(ctx context.Context, from *client, options ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	response, err := from.GenerateImages(ctx, request(1), options...)
	if err != nil {
		return err
	}
	return checkOne(response)
}

func withMetadata(value string) context.Context {
	return metadata.AppendToOutgoingContext(context.Background(), "x-large", value)
}

func checkCode(err error, want codes.Code) error {
	if status.Code(err) != want {
		return fmt.Errorf("the status is not %v: %v", want, err)
	}
	return nil
}

// A stream of requests that is written by hand.
type each struct {
	pb.GenerationService_GenerateEachClient
	cancel context.CancelFunc
}

func openEach(from *client, timeout time.Duration) (*each, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	stream, err := from.GenerateEach(ctx)
	return &each{stream, cancel}, err
}

func (stream *each) exchange() error {
	if err := stream.Send(&pb.GenerateEachRequest{Generate: request(1)}); err != nil && err != io.EOF {
		return err
	}
	answer, err := stream.Recv()
	if err != nil {
		return err
	}
	if answer.GetError() != nil {
		return fmt.Errorf("%v", answer.GetError())
	}
	return checkOne(answer.GetResponse())
}

func (stream *each) end() error {
	defer stream.cancel()
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if answer, err := stream.Recv(); err != io.EOF {
		return fmt.Errorf("the stream does not end with OK: %v, %v", answer, err)
	}
	return nil
}

func unary(from *client, to target) error { return one(context.Background(), from) }

func pixels(from *client, to target) error {
	response, err := from.GenerateImages(context.Background(), request(16))
	if err != nil {
		return err
	}
	if !bytes.Equal(response.Pixels, to.pixels) {
		return fmt.Errorf("the pixels are not those that the SDK gets")
	}
	return nil
}

func eachWithHalfClose(from *client, to target) error {
	stream, err := openEach(from, limit)
	if err != nil {
		return err
	}
	defer stream.cancel()
	for _, name := range []string{model, "no-such-model", model} {
		generate := request(1)
		generate.Model = name
		if err := stream.Send(&pb.GenerateEachRequest{Generate: generate}); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	for index := 0; ; index++ {
		answer, err := stream.Recv()
		if err == io.EOF && index == 3 {
			break
		}
		if err != nil {
			return err
		}
		if (answer.GetError() != nil) != (index == 1) {
			return fmt.Errorf("answer %d is %v", index, answer)
		}
	}
	stream, err = openEach(from, limit)
	if err != nil {
		return err
	}
	for range [3]int{} {
		if err := stream.exchange(); err != nil {
			return err
		}
	}
	return stream.end()
}

func stream(from *client, to target) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	answers, err := from.StreamImages(ctx, &pb.StreamImagesRequest{Generate: request(streamCount)})
	if err != nil {
		return err
	}
	count := uint32(0)
	for {
		answer, err := answers.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		count += answer.Chunk.Count
	}
	if count != streamCount {
		return fmt.Errorf("%d images", count)
	}
	return nil
}

func deadline(from *client, to target) error {
	if err := one(context.Background(), from); err != nil {
		return err
	}
	for _, timeout := range []time.Duration{time.Millisecond, 300 * time.Millisecond} {
		stream, err := openEach(from, timeout)
		if err == nil {
			_, err = stream.Recv()
		}
		if err := checkCode(err, codes.DeadlineExceeded); err != nil {
			return err
		}
		stream.cancel()
	}
	return one(context.Background(), from)
}

func cancel(from *client, to target) error {
	ctx, cancel := context.WithCancel(context.Background())
	answers, err := from.StreamImages(ctx, &pb.StreamImagesRequest{Generate: request(endlessCount)})
	if err != nil {
		return err
	}
	if _, err = answers.Recv(); err != nil {
		return err
	}
	cancel()
	for err == nil {
		_, err = answers.Recv()
	}
	if err := checkCode(err, codes.Canceled); err != nil {
		return err
	}
	return one(context.Background(), from)
}

func compressed(from *client, to target) error {
	generate := request(0)
	generate.Labels = make([]uint32, 256)
	generate.Count = 256
	response, err := from.GenerateImages(context.Background(), generate, grpc.UseCompressor(gzip.Name))
	if err == nil && len(response.Labels) != 256 {
		err = fmt.Errorf("%d labels", len(response.Labels))
	}
	return err
}

func largeMetadata(from *client, to target) error { return one(withMetadata(acceptedMetadata), from) }

func oversized(from *client, to target) error {
	other, err := openEach(from, limit)
	if err != nil {
		return err
	}
	if err := other.exchange(); err != nil {
		return err
	}
	for range [3]int{} {
		err := one(withMetadata(refusedMetadata), from)
		switch status.Code(err) {
		case codes.ResourceExhausted, codes.Unknown, codes.Internal:
		default:
			return fmt.Errorf("20 KB of metadata: %v", err)
		}
		if err := other.exchange(); err != nil {
			return fmt.Errorf("the other stream: %v", err)
		}
		if err := one(context.Background(), from); err != nil {
			return err
		}
	}
	return other.end()
}

func details(from *client, to target) error {
	wrong := request(1)
	wrong.Truncation = 3
	_, err := from.GenerateImages(context.Background(), wrong)
	if err := checkCode(err, codes.InvalidArgument); err != nil {
		return err
	}
	found := ""
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				found += violation.Field
			}
		case *errdetails.ErrorInfo:
			found += " " + detail.Reason + " " + detail.Domain
		}
	}
	if found != "truncation INVALID ganserve" {
		return fmt.Errorf("the details are %q of %v", found, status.Convert(err).Proto())
	}
	return nil
}

func alive(from *client, to target) error {
	stream, err := openEach(from, limit)
	if err != nil {
		return err
	}
	if err := stream.exchange(); err != nil {
		return err
	}
	time.Sleep(quiet)
	if err := stream.exchange(); err != nil {
		return err
	}
	return stream.end()
}

// Runs a function count times at once; returns the first error.
func together(count int, do func(int) error) error {
	var all sync.WaitGroup
	results := make([]error, count)
	for index := range results {
		all.Add(1)
		go func(index int) {
			defer all.Done()
			results[index] = do(index)
		}(index)
	}
	all.Wait()
	for _, err := range results {
		if err != nil {
			return err
		}
	}
	return nil
}

func streams(from *client, to target) error {
	every := make([]*each, openStreams)
	err := together(openStreams, func(index int) (err error) {
		if every[index], err = openEach(from, limit); err == nil {
			err = every[index].exchange()
		}
		return err
	})
	if err != nil {
		return err
	}
	return together(openStreams, func(index int) error { return every[index].end() })
}

func aged(from *client, to target) error {
	end := time.Now().Add(age)
	return together(4, func(int) error {
		for time.Now().Before(end) {
			if err := one(context.Background(), from); err != nil {
				return err
			}
		}
		return nil
	})
}

var scenarios = map[string]func(*client, target) error{
	"unary": unary, "pixels": pixels, "each": eachWithHalfClose, "stream": stream, "deadline": deadline, "cancel": cancel,
	"gzip": compressed, "metadata": largeMetadata, "oversized": oversized, "details": details, "keepalive": alive,
	"streams": streams, "age": aged,
}

func run(name string, to target) error {
	options := []grpc.DialOption{}
	if name == "keepalive" { // 10 s is the least that grpc-go takes
		pings := keepalive.ClientParameters{Time: time.Second, Timeout: 30 * time.Second}
		options = append(options, grpc.WithKeepaliveParams(pings))
	}
	from, err := connect(to, options...)
	if err != nil {
		return err
	}
	defer from.connection.Close()
	return scenarios[name](from, to)
}

func main() {
	pixels, err := os.ReadFile(os.Args[3])
	if err != nil {
		panic(err)
	}
	code := 0
	for _, name := range os.Args[4:] {
		if err := run(name, target{os.Args[1], os.Args[2], pixels}); err != nil {
			fmt.Printf("failed %s: %s\n", name, strings.Join(strings.Fields(err.Error()), " "))
			code = 1
		} else {
			fmt.Printf("ok %s\n", name)
		}
	}
	os.Exit(code)
}
